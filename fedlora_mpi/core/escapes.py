"""Escapes foreign text for terminals, TeX, Markdown, HTML and CSV.

Foreign text comes from names in a config, leaves, folders and errors.
"""

import re
import unicodedata
from html import escape

# Controls move the cursor or rename the window, format characters reverse the direction of writing,
# and half a surrogate pair cannot be written at all.
_CONTROL_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
_TEX_ESCAPES = str.maketrans(
    {c: f"\\{c}" for c in "%_&#${}"}
    | {"\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}"}
    | {"±": "$\\pm$", "→": "$\\to$"}
)


def escape_line(text: object) -> str:
    """Return a text that is safe to print.

    Characters that act on a terminal, line ends included, are escaped as in Python.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        _escape_character(c) if unicodedata.category(c) in _CONTROL_CATEGORIES else c for c in text
    )


def summarize_error(error: BaseException) -> str:
    """The message of an exception on one line, with its type unless that adds nothing."""
    message = " ".join(str(error).split())
    if not message or type(error) not in (RuntimeError, ValueError, AssertionError, OSError):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    return message if len(message) <= 300 else f"{message[:297]}..."


def escape_lines(text: object) -> str:
    """``escape_line`` of each line of a text."""
    return "\n".join(map(escape_line, str(text).split("\n")))


def escape_tex(text: object) -> str:
    """A one-line text that TeX prints literally."""
    return escape_line(text).translate(_TEX_ESCAPES)


def escape_markdown(text: object) -> str:
    """A one-line text that cannot end a Markdown cell."""
    return escape_line(text).replace("|", "\\|")


def escape_html(text: object) -> str:
    """A one-line text without HTML markup."""
    return escape(escape_line(text))


def csv_cell(value: object) -> object:
    """Return the value of a CSV cell that no spreadsheet reads as a formula.

    A text that looks like a formula gets a leading ``'``, as OWASP advises.
    """
    if (
        not isinstance(value, str)
        or not value.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
        or _is_number(value)
    ):
        return value
    return f"'{value}"


def safe_file_name(text: object) -> str:
    """A part of a file name or page address: ASCII letters, digits, ``_``, ``-`` and ``.`` only."""
    return re.sub(r"[^\w.-]|\.(?=\.)", "-", escape_line(text), flags=re.ASCII)[:100]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _escape_character(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()
