"""Put several short texts of a client into one input of a language model.

A text ends with its last target, because what follows predicts nothing. The texts of a client,
training and test apart, go into rows of ``data.text.length`` tokens: each into the first row with
room for it, the longest first, equally long ones in the order of the split. Nothing is drawn, and
no text is divided.
``models.packing`` says how a network finds the texts of a row.
"""

import numpy as np
import torch

from ..core.losses import IGNORED
from .datasets import Data
from .partition import Rows, Split
from .samples import Samples


def pack_texts(data: Data, split: Split) -> tuple[Data, Split]:
    """Return packed rows of the texts in ``data``, and which client has which rows.

    The rows have no topics: the class counts of the new split are numbers of rows, [N, 1].
    """
    train, train_rows = _pack_side(data, data.train, split.train)
    test, test_rows = _pack_side(data, data.test, split.test)
    counts = (np.array([[len(rows)] for rows in side]) for side in (train_rows, test_rows))
    packed = data._replace(train=train, test=test, owners=None, topics=None)
    return packed, Split(train_rows, test_rows, *counts)


def first_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """Return the row of each text, [M]: the first with room for it; longer texts choose first.

    sizes: [M] tokens of each text, from 1 to ``length``, the tokens of a row.
    """
    room = np.zeros(0, np.int64)  # tokens that are left in each row
    row_of_text = np.zeros(len(sizes), np.int64)
    for size in np.unique(sizes)[::-1]:
        texts = np.flatnonzero(sizes == size)
        # a row that is too full for this size stays so: rows are filled one after another
        more_texts = len(texts) - (room // size).sum()
        more_rows = max(0, -(-more_texts // (length // size)))
        room = np.append(room, np.full(more_rows, length))
        rows = np.repeat(np.arange(len(room)), room // size)[: len(texts)]
        row_of_text[texts] = rows
        room -= size * np.bincount(rows, minlength=len(room))
    return row_of_text


def _pack_side(data: Data, samples: Samples, texts_of_clients: Rows) -> tuple[Samples, Rows]:
    """Return the packed rows of all clients, and which client has which rows.

    samples: a side of ``data``; texts_of_clients: which client has which of them.
    """
    x, y = samples.x.numpy(), samples.y.numpy()
    sizes = _text_sizes(y)
    inputs, targets, rows_of_clients, first_row = [], [], [], 0
    for texts in texts_of_clients:
        packed = _pack_client(data, x[texts], y[texts], sizes[texts])
        inputs.append(packed[0])
        targets.append(packed[1])
        rows_of_clients.append(np.arange(first_row, first_row + len(packed[0])))
        first_row += len(packed[0])
    joined = (torch.from_numpy(np.concatenate(parts)) for parts in (inputs, targets))
    return Samples(*joined), tuple(rows_of_clients)


def _text_sizes(y: np.ndarray) -> np.ndarray:
    """Return the tokens of each text up to its last target, [M]; 1 if it has no target."""
    has_target = y != IGNORED
    last = y.shape[1] - has_target[:, ::-1].argmax(1)
    return np.where(has_target.any(1), last, 1)


def _pack_client(
    data: Data, x: np.ndarray, y: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the packed rows [R, L] and their targets [R, L] of a client's texts.

    x: token ids [M, L]; y: their targets [M, L]; sizes: tokens of each text [M].
    """
    length = x.shape[1]
    row_of_text = first_fit(sizes, length)
    rows = int(row_of_text.max(initial=-1)) + 1
    packed_x = np.full((rows, length), data.padding, x.dtype)
    packed_y = np.full((rows, length), IGNORED, y.dtype)
    ends = np.zeros(rows, np.int64)
    for text in np.argsort(-sizes, kind="stable"):
        row, size = row_of_text[text], sizes[text]
        begin = ends[row]
        packed_x[row, begin : begin + size] = x[text, :size]
        packed_x[row, begin] += data.tokens  # marks where a text begins
        packed_y[row, begin : begin + size] = y[text, :size]
        ends[row] += size
    return packed_x, packed_y
