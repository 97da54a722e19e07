"""Read feature vectors and their classes from CSV files; an error names the file and the line."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .csv_texts import column_index, read_rows
from .own import OwnData


@dataclass(frozen=True)
class Table:
    """The ``data.table`` block: the files in ``data.root``, and what their columns are."""

    train: str = "train.csv"
    test: str = "test.csv"
    label: str = "label"  # the column of the classes
    client: str | None = None  # the column of the clients; None: the files have none
    columns: tuple[str, ...] = ()  # the columns of the features; (): all others


class _Side(NamedTuple):
    """The columns of a file."""

    x: np.ndarray  # [M, F] float32
    labels: np.ndarray  # [M] integers or texts
    clients: np.ndarray | None  # the same


def read_tables(folder: str, settings: Table) -> OwnData:
    """Read a training and a test file of numbers whose first rows name the columns.

    Both files have the same columns of features; those of the training file give the order. Raises
    ValueError with the line for a row that does not fit and for a cell that is no finite number.
    """
    header = next(read_rows(folder, "table.train", settings.train))
    names = [name.strip() for name in header.fields]
    others = [name for name in names if name not in (settings.label, settings.client)]
    columns = list(settings.columns) or others
    if not columns:
        raise ValueError(f"table.train = {settings.train}: has no column of features")
    train, test = (_read_side(folder, key, settings, columns) for key in ("train", "test"))
    return OwnData(train.x, train.labels, test.x, test.labels, train.clients, test.clients)


def _read_side(folder: str, key: str, settings: Table, columns: list[str]) -> _Side:
    """Return the features, labels and clients of one file."""
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
        numbers = []
        for column, index in zip(columns, features, strict=True):
            try:
                numbers.append(float(row.fields[index]))
            except ValueError:
                raise ValueError(
                    f"{row.location}: {row.fields[index]!r} in column {column} is no number"
                ) from None
        if not np.isfinite(values := np.array(numbers, np.float64).astype(np.float32)).all():
            raise ValueError(f"{row.location}: holds a number that is not finite in float32")
        x.append(values)
        labels.append(_cell(row.location, settings.label, row.fields[label]))
        if isinstance(client, int):
            clients.append(_cell(row.location, settings.client, row.fields[client]))
    if not x:
        raise ValueError(f"table.{key} = {name}: has no row under the names of the columns")
    return _Side(
        np.stack(x), np.array(labels), np.array(clients) if settings.client is not None else None
    )


def _cell(location: str, column: str | None, text: str) -> str:
    """Return a label or client without surrounding blanks."""
    if not (cell := text.strip()):
        raise ValueError(f"{location}: has no {column}; give it one, or remove the row")
    return cell
