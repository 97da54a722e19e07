"""Read texts and their classes from CSV files; an error names the file and the line."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from .labels import similar_label_hints
from .samples import LabelledTexts, RawTexts
from .texts import Text

_AG_NEWS_CLASSES = ("World", "Sports", "Business", "Sci/Tech")  # its classes.txt
_INTEGER = re.compile(r"-?\d+")


class Row(NamedTuple):
    """One row of a file."""

    location: str  # "key = file: line n"
    line: int  # the first line of the row
    fields: list[str]

    @property
    def has_several_lines(self) -> bool:
        """Whether some field contains a line break."""
        return any("\n" in field or "\r" in field for field in self.fields)


class Table(NamedTuple):
    """The rows of a file, without its header row."""

    texts: list[str]
    labels: list[str]
    lines: list[int]
    hints: tuple[str, ...]


def read_ag_news(folder: str, settings: Text) -> RawTexts:
    """Read the AG News files of Zhang et al. (NIPS 2015): rows of class, title and description.

    The files are those that torchtext downloads. Raises ValueError for any other row.
    """

    hints: list[str] = []
    labels = {"1", "2", "3", "4"}

    def read_side(key: str) -> LabelledTexts:
        name, multiline_rows = getattr(settings, key), []
        samples = LabelledTexts([], [])
        for row in read_rows(folder, f"text.{key}", name):
            if len(row.fields) != 3 or row.fields[0] not in labels:
                raise ValueError(
                    f"{row.location}: must be a class from 1 to 4, a title and a description"
                )
            samples.y.append(int(row.fields[0]) - 1)
            samples.texts.append(" ".join(row.fields[1:]))
            multiline_rows += [row] if row.has_several_lines else []
        hints.extend(
            f"text.{key} = {name}: {hint}"
            for hint in _open_quote_hints(multiline_rows, 3, 0, labels)
        )
        return samples

    return RawTexts(read_side("train"), read_side("test"), 4, _AG_NEWS_CLASSES, tuple(hints))


def read_csv(folder: str, settings: Text) -> RawTexts:
    """Read a training and a test file whose first rows name the columns.

    The classes are the labels of the training file, without surrounding blanks, sorted (as numbers
    if all are integers). Raises ValueError with the line for a label that only the test file has
    and for a row that does not fit the columns.
    """
    train, test = (_read_table(folder, key, settings) for key in ("train", "test"))
    all_integers = all(_INTEGER.fullmatch(label) for label in train.labels)
    names = sorted(set(train.labels), key=lambda label: (int(label) if all_integers else 0, label))
    class_of_label = {name: c for c, name in enumerate(names)}
    for line, label in zip(test.lines, test.labels, strict=True):
        if label not in class_of_label:
            known_labels = ", ".join(map(_single_line, names[:10]))
            ellipsis = " ..." if len(names) > 10 else ""
            raise ValueError(
                f"text.test = {settings.test}: the label {label!r} is not in {settings.train}; "
                f"there are {known_labels}{ellipsis}; it is in line {line}"
            )
    train_texts, test_texts = (
        LabelledTexts(side.texts, [class_of_label[label] for label in side.labels])
        for side in (train, test)
    )
    hints = similar_label_hints(f"text.train = {settings.train}", names)
    return RawTexts(
        train_texts, test_texts, len(names), tuple(names), hints + train.hints + test.hints
    )


def _read_table(folder: str, key: str, settings: Text) -> Table:
    """Return the texts and the labels of one file."""
    name = getattr(settings, key)
    rows = read_rows(folder, f"text.{key}", name)
    header = next(rows)
    columns = [column.strip() for column in header.fields]
    wanted_columns = [
        ("text.label", settings.label),
        *(("text.columns", column) for column in settings.columns),
    ]
    label_index, *text_indices = (
        column_index(header, field, column.strip(), name) for field, column in wanted_columns
    )
    texts, labels, lines, multiline_rows = [], [], [], []
    for row in rows:
        if len(row.fields) != len(columns):
            raise ValueError(
                f"{row.location}: has {len(row.fields)} fields, the first row {len(columns)}"
            )
        if not (row_label := row.fields[label_index].strip()):
            raise ValueError(
                f"{row.location}: has no label in column {settings.label}; give it one, or remove "
                "the row"
            )
        texts.append(" ".join(row.fields[i] for i in text_indices))
        labels.append(row_label)
        lines.append(row.line)
        if row.has_several_lines:
            multiline_rows.append(row)
    if not texts:
        raise ValueError(f"text.{key} = {name}: has no row under the names of the columns")
    empty = [line for line, text in zip(lines, texts, strict=True) if not text.strip()]
    hints = [f"{len(empty)} texts are empty (first: line {empty[0]})"] if empty else []
    hints += _open_quote_hints(multiline_rows, len(columns), label_index, set(labels))
    return Table(texts, labels, lines, tuple(f"text.{key} = {name}: {hint}" for hint in hints))


def column_index(header: Row, key: str, column: str, file: str) -> int:
    """Return the index of a column, which the setting ``key`` names.

    Raises ValueError unless the header names it exactly once.
    """
    columns = [name.strip() for name in header.fields]
    if column not in columns:
        known_columns = ", ".join(map(_single_line, columns))
        raise ValueError(f"{key} = {column}: {file} has no such column; there are {known_columns}")
    if columns.count(column) > 1:
        times = columns.count(column)
        raise ValueError(
            f"{header.location}: names the column {column} {times} times; name it once"
        )
    return columns.index(column)


def _open_quote_hints(rows: Sequence[Row], columns: int, label: int, labels: set[str]) -> list[str]:
    """Return a hint if lines inside one text look like rows, else an empty list.

    An unclosed quotation mark joins rows into one text in this way.
    """
    for row in rows:
        lines = [line for field in row.fields for line in field.splitlines()]
        cells = [line.split(",") for line in lines if line not in row.fields]
        row_count = sum(
            len(cell) == columns and cell[label].strip(' "') in labels for cell in cells
        )
        if row_count:
            message = (
                f"{row_count} lines within this text look like rows; is a quotation mark open?"
            )
            return [f"line {row.line}: {message}"]
    return []


def read_rows(folder: str, key: str, name: str) -> Iterator[Row]:
    """Yield every row of the file ``name``, which the setting ``key`` names, except empty lines.

    Raises ValueError if the file cannot be read, is not strict CSV in UTF-8, or has no row.
    """
    source, path, line, empty = f"{key} = {name}", os.path.join(folder, name), 0, True
    try:
        with open(path, newline="", encoding="utf-8-sig") as file, _unlimited_fields():
            reader = csv.reader(file, strict=True)
            for fields in reader:
                if any("\0" in field for field in fields):
                    raise csv.Error("holds a NUL byte, which is no text")
                first, line = line + 1, reader.line_num
                if fields:  # not an empty line
                    empty = False
                    yield Row(f"{source}: line {first}", first, fields)
    except OSError as error:
        raise ValueError(
            f"{source}: cannot be read in {folder} ({error.strerror}); put it there or name another"
        ) from error
    except UnicodeDecodeError as error:
        line = _count_utf8_lines(path)
        why = f"line {line + 1}: {error.reason}); save it in UTF-8"
        raise ValueError(f"{source}: is no CSV file in UTF-8 after line {line} ({why}") from error
    except csv.Error as error:
        why = _explain_csv_error(str(error), line + 1)
        raise ValueError(f"{source}: is no CSV file in UTF-8 after line {line} ({why})") from error
    if empty:
        raise ValueError(f"{source}: is empty, in {folder}")


@contextmanager
def _unlimited_fields() -> Iterator[None]:
    old_limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(old_limit)


def _count_utf8_lines(path: str) -> int:
    """Return the number of whole lines before the first byte that is not UTF-8."""
    with open(path, "rb") as file:
        content = file.read()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return len(re.findall(rb"\r\n|\r|\n", content[: error.start]))
    return 0


def _explain_csv_error(error: str, line: int) -> str:
    """Explain an error of Python's csv module for the row that begins at ``line``."""
    if error == "unexpected end of data":
        return f"line {line}: a quotation mark opens here and never closes"
    if "expected after" in error:
        rule = "within quoted text each is doubled"
        return f"line {line}: text follows a closing quotation mark; {rule}"
    return f"line {line}: {error}"


def _single_line(label: str) -> str:
    """Return a label without line breaks."""
    return " ".join(label.split())
