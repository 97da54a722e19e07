"""Texts and their classes from CSV files, read strictly: an odd row is named by file and line."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from .labels import hint_of_alike
from .samples import Labelled, Reading
from .texts import Text

_AG_NEWS = ("World", "Sports", "Business", "Sci/Tech")  # its classes.txt
_WHOLE = re.compile(r"-?\d+")


class Row(NamedTuple):
    """One row of a file."""

    where: str  # "key = file: line n"
    line: int  # its first
    fields: list[str]

    @property
    def has_several_lines(self) -> bool:
        """Whether the end of a line stands within a text."""
        return any("\n" in field or "\r" in field for field in self.fields)


class Table(NamedTuple):
    """The rows of a file, without the names of its columns."""

    texts: list[str]
    labels: list[str]
    lines: list[int]
    hints: tuple[str, ...]


def read_ag_news(folder: str, settings: Text) -> Reading:
    """The files of Zhang et al. (NIPS 2015), as torchtext has them: class, title, description."""

    hints, labels = [], {"1", "2", "3", "4"}

    def side(key: str) -> Labelled:
        name, long = getattr(settings, key), []
        found = Labelled([], [])
        for row in _rows(folder, key, name):
            if len(row.fields) != 3 or row.fields[0] not in labels:
                raise ValueError(
                    f"{row.where}: must be a class from 1 to 4, a title and a description"
                )
            found.y.append(int(row.fields[0]) - 1)
            found.texts.append(" ".join(row.fields[1:]))
            long += [row] if row.has_several_lines else []
        hints.extend(
            f"text.{key} = {name}: {hint}" for hint in _hint_of_swallowed(long, 3, 0, labels)
        )
        return found

    return Reading(side("train"), side("test"), 4, _AG_NEWS, tuple(hints))


def read_csv(folder: str, settings: Text) -> Reading:
    """Two files whose first rows name the columns.

    The classes are the labels of the training file, without blanks around them, sorted (as numbers
    where all are integers). Raises ValueError, with the line: a label of the test file alone, a row
    that is no row of its file.
    """
    train, test = (_read_table(folder, key, settings) for key in ("train", "test"))
    whole = all(_WHOLE.fullmatch(label) for label in train.labels)
    names = sorted(set(train.labels), key=lambda label: (int(label) if whole else 0, label))
    index = {name: c for c, name in enumerate(names)}
    for line, label in zip(test.lines, test.labels, strict=True):
        if label not in index:
            there = ", ".join(map(_in_line, names[:10])) + " ..." * (len(names) > 10)
            raise ValueError(
                f"text.test = {settings.test}: the label {label!r} is not in {settings.train}; "
                f"there are {there}; it is in line {line}"
            )
    classes = ([index[label] for label in side.labels] for side in (train, test))
    sides = map(Labelled, (train.texts, test.texts), classes)
    hints = hint_of_alike(f"text.train = {settings.train}", names)
    return Reading(*sides, len(names), tuple(names), hints + train.hints + test.hints)


def _read_table(folder: str, key: str, settings: Text) -> Table:
    """The texts and the labels of one file."""
    name = getattr(settings, key)
    rows = _rows(folder, key, name)
    header = next(rows)
    columns = [column.strip() for column in header.fields]
    wanted = [("label", settings.label), *(("columns", column) for column in settings.columns)]
    label, *at = (_place(header, field, column.strip(), name) for field, column in wanted)
    texts, labels, lines, long = [], [], [], []
    for row in rows:
        if len(row.fields) != len(columns):
            raise ValueError(
                f"{row.where}: has {len(row.fields)} fields, the first row {len(columns)}"
            )
        if not (mine := row.fields[label].strip()):
            raise ValueError(
                f"{row.where}: has no label in column {settings.label}; give it one, or remove "
                "the row"
            )
        texts.append(" ".join(row.fields[i] for i in at))
        labels.append(mine)
        lines.append(row.line)
        if row.has_several_lines:
            long.append(row)
    if not texts:
        raise ValueError(f"text.{key} = {name}: has no row under the names of the columns")
    empty = [line for line, text in zip(lines, texts, strict=True) if not text.strip()]
    hints = [f"{len(empty)} texts are empty (first: line {empty[0]})"] if empty else []
    hints += _hint_of_swallowed(long, len(columns), label, set(labels))
    return Table(texts, labels, lines, tuple(f"text.{key} = {name}: {hint}" for hint in hints))


def _place(header: Row, field: str, column: str, file: str) -> int:
    """The place of a column in a row."""
    columns = [name.strip() for name in header.fields]
    if column not in columns:
        there = ", ".join(map(_in_line, columns))
        raise ValueError(f"text.{field} = {column}: {file} has no such column; there are {there}")
    if columns.count(column) > 1:
        times = columns.count(column)
        raise ValueError(f"{header.where}: names the column {column} {times} times; name it once")
    return columns.index(column)


def _hint_of_swallowed(
    rows: Sequence[Row], columns: int, label: int, labels: set[str]
) -> list[str]:
    """What is said when lines within a text look like rows, as between two open quotation marks."""
    for row in rows:
        lines = [line for field in row.fields for line in field.splitlines()]
        cells = [line.split(",") for line in lines if line not in row.fields]
        like = sum(len(cell) == columns and cell[label].strip(' "') in labels for cell in cells)
        if like:
            what = f"{like} lines within this text look like rows; is a quotation mark open?"
            return [f"line {row.line}: {what}"]
    return []


def _rows(folder: str, key: str, name: str) -> Iterator[Row]:
    """Every row that is no empty line; of one at least."""
    where, path, line, empty = f"text.{key} = {name}", os.path.join(folder, name), 0, True
    try:
        with open(path, newline="", encoding="utf-8-sig") as file, _fields_of_any_length():
            reader = csv.reader(file, strict=True)
            for fields in reader:
                if any("\0" in field for field in fields):
                    raise csv.Error("holds a NUL byte, which is no text")
                first, line = line + 1, reader.line_num
                if fields:  # not an empty line
                    empty = False
                    yield Row(f"{where}: line {first}", first, fields)
    except OSError as error:
        raise ValueError(
            f"{where}: cannot be read in {folder} ({error.strerror}); put it there or name another"
        ) from error
    except UnicodeDecodeError as error:
        line = _lines_in_utf8(path)
        why = f"line {line + 1}: {error.reason}); save it in UTF-8"
        raise ValueError(f"{where}: is no CSV file in UTF-8 after line {line} ({why}") from error
    except csv.Error as error:
        why = _explain(str(error), line + 1)
        raise ValueError(f"{where}: is no CSV file in UTF-8 after line {line} ({why})") from error
    if empty:
        raise ValueError(f"{where}: is empty, in {folder}")


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _lines_in_utf8(path: str) -> int:
    """Whole lines before the first byte that is not in UTF-8."""
    with open(path, "rb") as file:
        content = file.read()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return len(re.findall(rb"\r\n|\r|\n", content[: error.start]))
    return 0


def _explain(error: str, line: int) -> str:
    """What the library's words mean for the row that begins at a line."""
    if error == "unexpected end of data":
        return f"line {line}: a quotation mark opens here and never closes"
    if "expected after" in error:
        rule = "within quoted text each is doubled"
        return f"line {line}: text follows a closing quotation mark; {rule}"
    return f"line {line}: {error}"


def _in_line(label: str) -> str:
    """A label without line breaks."""
    return " ".join(label.split())
