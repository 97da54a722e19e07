"""Text that others wrote (a name in a config, a leaf, a folder, an error) on its way to a terminal,
to TeX, to CSV.
"""

import re
import unicodedata
from html import escape

# Controls move the cursor or rename the window, format characters turn the direction of writing
# around, and a half of a surrogate pair cannot be written at all.
_CONTROL_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
_TEX_ESCAPES = str.maketrans(
    {c: f"\\{c}" for c in "%_&#${}"}
    | {"\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}"}
    | {"±": "$\\pm$", "→": "$\\to$"}
)


def escape_line(text: object) -> str:
    """A text that a terminal only shows: what would act on it, the end of a line too, is escaped as
    Python does.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        _escape_character(c) if unicodedata.category(c) in _CONTROL_CATEGORIES else c for c in text
    )


def summarize_error(error: BaseException) -> str:
    """What an exception says, on one line; with its type, unless that adds nothing."""
    message = " ".join(str(error).split())
    if not message or type(error) not in (RuntimeError, ValueError, AssertionError, OSError):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    return message if len(message) <= 300 else f"{message[:297]}..."


def escape_lines(text: object) -> str:
    """The same of several lines."""
    return "\n".join(map(escape_line, str(text).split("\n")))


def escape_tex(text: object) -> str:
    """A text of one line that TeX sets as it is."""
    return escape_line(text).translate(_TEX_ESCAPES)


def escape_markdown(text: object) -> str:
    """A text of one line that does not end a cell in Markdown."""
    return escape_line(text).replace("|", "\\|")


def escape_html(text: object) -> str:
    """A text of one line that is no HTML."""
    return escape(escape_line(text))


def csv_cell(value: object) -> object:
    """A cell of a CSV: a text that a spreadsheet would take for a formula gets a ``'`` before it,
    as OWASP says.
    """
    if (
        not isinstance(value, str)
        or not value.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
        or _is_number(value)
    ):
        return value
    return f"'{value}"


def safe_file_name(text: object) -> str:
    """A part of a file name, and of an address in a page, with nothing but letters, digits, ``_``,
    ``-`` and ``.``.
    """
    return re.sub(r"[^\w.-]|\.(?=\.)", "-", escape_line(text), flags=re.ASCII)[:100]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _escape_character(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()
