"""Text that others wrote (a name in a config, a leaf, a folder, an error) on its way to a terminal,
to TeX, to CSV.
"""

import re
import unicodedata
from html import escape

# Controls move the cursor or rename the window, format characters turn the direction of writing
# around, and a half of a surrogate pair cannot be written at all.
_ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")
_TEX = str.maketrans(
    {c: f"\\{c}" for c in "%_&#${}"}
    | {"\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}"}
    | {"±": "$\\pm$", "→": "$\\to$"}
)


def one_line(text: object) -> str:
    """A text that a terminal only shows: what would act on it, the end of a line too, is escaped as
    Python does.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in _ACTING else c for c in text)


def brief(error: BaseException) -> str:
    """What an exception says, on one line; with its type, unless that adds nothing."""
    said = " ".join(str(error).split())
    if not said or type(error) not in (RuntimeError, ValueError, AssertionError, OSError):
        said = f"{type(error).__name__}: {said}".removesuffix(": ")
    return said if len(said) <= 300 else f"{said[:297]}..."


def lines(text: object) -> str:
    """The same of several lines."""
    return "\n".join(map(one_line, str(text).split("\n")))


def tex(text: object) -> str:
    """A text of one line that TeX sets as it is."""
    return one_line(text).translate(_TEX)


def markdown(text: object) -> str:
    """A text of one line that does not end a cell in Markdown."""
    return one_line(text).replace("|", "\\|")


def html_text(text: object) -> str:
    """A text of one line that is no HTML."""
    return escape(one_line(text))


def cell(value: object) -> object:
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


def file_name(text: object) -> str:
    """A part of a file name, and of an address in a page, with nothing but letters, digits, ``_``,
    ``-`` and ``.``.
    """
    return re.sub(r"[^\w.-]|\.(?=\.)", "-", one_line(text), flags=re.ASCII)[:100]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()
