"""The values that the reader of a data set returns."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Samples(NamedTuple):
    """Inputs and their classes, or other targets."""

    x: Tensor  # [M, ch, H, W] uint8, [M, L] int32 token ids, or float32 of any shape
    y: Tensor  # [M] int64 classes, or [M, k] float32


class LabelledTexts(NamedTuple):
    """Texts and their classes."""

    texts: list[str]
    y: list[int]


class RawTexts(NamedTuple):
    """A data set of texts as read: as ``RawData``."""

    train: LabelledTexts
    test: LabelledTexts
    classes: int
    class_names: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()


class RawData(NamedTuple):
    """A data set as read: both sides, its classes, and hints about the files."""

    train: Samples
    test: Samples
    classes: int
    class_names: tuple[str, ...] = ()  # empty if the classes have no names
    hints: tuple[str, ...] = ()  # one line each, "key = value: what was seen"


def to_samples(images: np.ndarray | Tensor, labels: Sequence[int] | Tensor) -> Samples:
    """Return samples from bytes [M, H, W] or [M, H, W, ch] and their labels."""
    x, y = torch.as_tensor(images), torch.as_tensor(labels, dtype=torch.int64)
    return Samples(x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2), y)
