"""Read feature vectors and their classes or numbers from CSV or Parquet files.

An error names the file and the line or row.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..core.extras import extra_imports
from ..core.losses import Targets
from .csv_texts import Row, column_index, read_rows
from .own import OwnData

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Table:
    """The ``data.table`` block: the files in ``data.root``, and what their columns are.

    The end of a name, .csv or .parquet, says what a file is.
    """

    train: str = "train.csv"
    test: str = "test.csv"
    label: str = "label"  # the column of the classes, or of another target of ``model.loss``
    client: str | None = None  # the column of the clients; None: the files have none
    columns: tuple[str, ...] = ()  # the columns of the features; (): all others


class _Side(NamedTuple):
    """The columns of a file."""

    x: np.ndarray  # [M, F] float32
    labels: np.ndarray  # [M] texts
    clients: np.ndarray | None  # the same


def read_tables(folder: str, settings: Table, wanted: Targets | None = "classes") -> OwnData:
    """Read a training and a test file of numbers with named columns.

    Both files have the same columns of features; those of the training file give the order. wanted:
    what the label column must hold; None: floats are numbers, as in arrays. Raises ValueError for a
    file that cannot be read, with the line or row for a cell that is no finite number.
    """
    names = _column_names(folder, settings)
    others = [name for name in names if name not in (settings.label, settings.client)]
    columns = list(settings.columns) or others
    if not columns:
        raise ValueError(f"table.train = {settings.train}: has no column of features")
    train, test = (
        _read_parquet(folder, key, settings, columns, allows_floats=wanted != "classes")
        if _is_parquet(getattr(settings, key))
        else _read_csv(folder, key, settings, columns)
        for key in ("train", "test")
    )
    labels = train.labels, test.labels
    y_train, y_test = labels if wanted else _floats_as_numbers(*labels)
    return OwnData(train.x, y_train, test.x, y_test, train.clients, test.clients)


def _floats_as_numbers(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels of both sides as float64, if all are numbers and not all are integers."""
    try:
        numbers = train.astype(np.float64), test.astype(np.float64)
    except ValueError:
        return train, test
    is_integer = all(re.fullmatch(r"[+-]?\d+", text) for text in (*train, *test))
    return (train, test) if is_integer else numbers


def _column_names(folder: str, settings: Table) -> Sequence[str]:
    """Return the names of the training file's columns, in their order."""
    if _is_parquet(settings.train):
        return _open_parquet(folder, "table.train", settings.train).column_names
    header = next(read_rows(folder, "table.train", settings.train))
    return [name.strip() for name in header.fields]


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


# --- CSV


def _read_csv(folder: str, key: str, settings: Table, columns: list[str]) -> _Side:
    """Return the features, labels and clients of a CSV file."""
    name = getattr(settings, key)
    rows = read_rows(folder, f"table.{key}", name)
    header = next(rows)
    feature_key = "table.columns" if settings.columns else f"table.{key}"
    features = [column_index(header, feature_key, column, name) for column in columns]
    label = column_index(header, "table.label", settings.label, name)
    client = settings.client and column_index(header, "table.client", settings.client, name)
    x, labels, clients = [], [], []
    for row in rows:
        if len(row.fields) != len(header.fields):
            raise ValueError(
                f"{row.location}: has {len(row.fields)} fields, the first row {len(header.fields)}"
            )
        x.append(_numbers(row, columns, features))
        labels.append(_cell(row.location, settings.label, row.fields[label]))
        if isinstance(client, int):
            clients.append(_cell(row.location, settings.client, row.fields[client]))
    if not x:
        raise ValueError(f"table.{key} = {name}: has no row under the names of the columns")
    return _Side(
        np.stack(x), np.array(labels), np.array(clients) if settings.client is not None else None
    )


def _numbers(row: Row, columns: list[str], indices: list[int]) -> np.ndarray:
    """Return the cells of ``columns`` as float32 [F]."""
    numbers = []
    for column, index in zip(columns, indices, strict=True):
        try:
            numbers.append(float(row.fields[index]))
        except ValueError:
            raise ValueError(
                f"{row.location}: {row.fields[index]!r} in column {column} is no number"
            ) from None
    if not np.isfinite(values := np.array(numbers, np.float64).astype(np.float32)).all():
        raise ValueError(f"{row.location}: holds a number that is not finite in float32")
    return values


def _cell(location: str, column: str | None, text: str) -> str:
    """Return a label or client without surrounding blanks."""
    if not (cell := text.strip()):
        raise ValueError(f"{location}: has no {column}; give it one, or remove the row")
    return cell


# --- Parquet


def _read_parquet(
    folder: str, key: str, settings: Table, columns: list[str], allows_floats: bool
) -> _Side:
    """Return the features, labels and clients of a Parquet file."""
    name = getattr(settings, key)
    location = f"table.{key} = {name}"
    table = _open_parquet(folder, f"table.{key}", name)
    header = Row(location, 1, table.column_names)
    feature_key = "table.columns" if settings.columns else f"table.{key}"
    named = [*((feature_key, column) for column in columns), ("table.label", settings.label)]
    if settings.client is not None:
        named.append(("table.client", settings.client))
    for key_of_column, column in named:
        column_index(header, key_of_column, column, name)
    if not table.num_rows:
        raise ValueError(f"{location}: has no row under the names of the columns")
    x = np.stack([_parquet_numbers(table, column, location) for column in columns], axis=1)
    labels = _parquet_labels(table, settings.label, location, allows_floats)
    clients = None if settings.client is None else _parquet_labels(table, settings.client, location)
    return _Side(x, labels, clients)


def _open_parquet(folder: str, key: str, name: str) -> "pyarrow.Table":
    """Return the content of a Parquet file. Raises ValueError if it cannot be read."""
    with extra_imports("pyarrow", "parquet", f"{key} = {name}"):
        import pyarrow
        from pyarrow import parquet
    try:
        return parquet.ParquetFile(os.path.join(folder, name)).read()
    except (OSError, pyarrow.ArrowException) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(
            f"{key} = {name}: cannot be read in {folder} ({why}); put it there or name another"
        ) from error


def _parquet_numbers(table: "pyarrow.Table", column: str, location: str) -> np.ndarray:
    """Return a column as float32 [M]."""
    import pyarrow

    cells = table.column(column)
    kinds = (pyarrow.types.is_integer, pyarrow.types.is_floating, pyarrow.types.is_boolean)
    if not any(is_kind(cells.type) for is_kind in kinds):
        raise ValueError(f"{location}: column {column} holds no numbers but {cells.type}")
    # An empty cell becomes NaN, which no feature may be.
    with np.errstate(over="ignore"):
        values = cells.cast("float64", safe=False).to_numpy().astype(np.float32)
    if len(wrong := np.flatnonzero(~np.isfinite(values))):
        raise ValueError(
            f"{location}: row {wrong[0] + 1}: column {column} is empty or not finite in float32"
        )
    return values


def _parquet_labels(
    table: "pyarrow.Table", column: str, location: str, allows_floats: bool = False
) -> np.ndarray:
    """Return the labels or clients of a column, texts, integers or floats, as texts [M]."""
    cells = [cell.strip() if isinstance(cell, str) else cell for cell in table[column].to_pylist()]
    for row, cell in enumerate(cells, 1):
        if cell is None or cell == "":
            raise ValueError(
                f"{location}: row {row}: has no {column}; give it one, or remove the row"
            )
        if not isinstance(cell, int | str) and not (allows_floats and isinstance(cell, float)):
            raise ValueError(
                f"{location}: row {row}: {cell!r} in column {column} must be a text or an integer"
            )
    return np.array([str(cell) for cell in cells])
