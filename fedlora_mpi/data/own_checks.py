"""Check a user's own arrays, as the files of the other data sets are checked when they are read.

``check`` says in one line which array does not fit, and turns those that fit into samples.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.losses import Targets
from .labels import similar_label_hints
from .own import OwnData
from .samples import Samples

_IMAGE_CHANNELS = (1, 3, 4)  # a last axis of this length is taken for channels
_SHOWN = 10  # labels or clients that a message lists
_BLOCK = 4096  # samples that are checked at once


class CheckedData(NamedTuple):
    """A data set in which everything fits; the fields are those of ``datasets.Data``."""

    train: Samples
    test: Samples
    classes: int
    mean: tuple[float, ...] | None  # None for bytes: that of the training pixels
    std: tuple[float, ...] | None
    class_names: tuple[str, ...]
    tokens: int
    padding: int
    owners: tuple[np.ndarray, np.ndarray] | None
    hints: tuple[str, ...]
    targets: Targets


def check(own: OwnData, setting: str, wanted: Targets | None = "classes") -> CheckedData:
    """Return the data set of these arrays; ``setting`` begins a message: "key = value".

    wanted: what y must hold; None: classes, labels or numbers, whichever it is. Raises ValueError
    with the name of the array that does not fit.
    """
    x_train, x_test = (_inputs(setting, name, getattr(own, name)) for name in ("x_train", "x_test"))
    if (x_train.shape[1:], x_train.dtype) != (x_test.shape[1:], x_test.dtype):
        kinds = " and ".join(f"{list(x.shape[1:])} of {x.dtype}" for x in (x_train, x_test))
        raise ValueError(
            f"{setting}: a sample of x_train and of x_test is {kinds}; make them alike"
        )
    sizes = len(x_train), len(x_test)
    targets = wanted or _kind_of_targets(setting, own)
    if targets == "classes":
        labels = [
            _identifiers(setting, f"y_{side}", getattr(own, f"y_{side}"), f"x_{side}", size)
            for side, size in zip(("train", "test"), sizes, strict=True)
        ]
        y, class_names, classes, hints = _number_labels(setting, labels, own.class_names)
    else:
        y, class_names, hints = *_values(setting, own, sizes, targets), ()
        classes = y[0].shape[1]
    owners, client_hints = _number_clients(setting, own, sizes)
    tokens, padding = _token_settings(setting, own, x_train, x_test)
    mean, std = _normalisation(setting, own, x_train)
    return CheckedData(
        Samples(_to_tensor(x_train), torch.from_numpy(y[0])),
        Samples(_to_tensor(x_test), torch.from_numpy(y[1])),
        classes,
        mean,
        std,
        class_names,
        tokens,
        padding,
        owners,
        (*hints, *client_hints),
        targets,
    )


def _kind_of_targets(setting: str, own: OwnData) -> Targets:
    """Return what ``y_train`` holds: integers or texts [M] are classes, values that are all 0 or 1
    are labels, and others are numbers.
    """
    y = _to_array(setting, "y_train", own.y_train)
    if y.dtype.kind != "f" and (y.ndim == 1 or y.shape[1:] == (1,)):
        return "classes"
    return "labels" if y.dtype.kind in "biuf" and np.isin(y, (0, 1)).all() else "numbers"


def _values(
    setting: str, own: OwnData, sizes: tuple[int, int], targets: Targets
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Return the targets [M, k] float32 of both sides, and the names of the k values."""
    y = []
    for side, size in zip(("train", "test"), sizes, strict=True):
        name = f"y_{side}"
        values = _to_array(setting, name, getattr(own, name))
        description = f"{setting}: {name} {list(values.shape)} of {values.dtype}"
        try:
            with np.errstate(over="ignore"):
                values = values.astype(np.float32)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{description}: holds what is no number ({error}), and model.loss needs {targets}"
            ) from error
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or len(values) != size or not values.shape[1]:
            raise ValueError(
                f"{description}: must be [samples] or [samples, k]; x_{side} has {size} samples"
            )
        _check_finite(setting, name, values)
        if targets == "labels" and not np.isin(values, (0, 1)).all():
            row = int(np.argwhere(~np.isin(values, (0, 1)))[0, 0])
            raise ValueError(
                f"{setting}: {name}[{row}] is {_join_shown(values[row].tolist())}; each label is "
                "0 or 1, for model.loss = bce"
            )
        y.append(values)
    if y[0].shape[1] != y[1].shape[1]:
        raise ValueError(
            f"{setting}: y_train has {y[0].shape[1]} values of each sample, y_test "
            f"{y[1].shape[1]}; make them alike"
        )
    if own.class_names is None:
        return y, ()
    names = [str(n) for n in _to_array(setting, "class_names", own.class_names).ravel()]
    if len(names) != y[0].shape[1]:
        raise ValueError(
            f"{setting}: class_names has {len(names)} names, and y {y[0].shape[1]} values of each "
            "sample; name each value"
        )
    return y, tuple(names)


def _to_array(setting: str, name: str, value: Any) -> np.ndarray:
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = value.float() if value.dtype == torch.bfloat16 else value
            return value.numpy()
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{setting}: {name} is no array ({' '.join(str(error).split())}); rows of one array "
            "have equal lengths, so pad them"
        ) from error


def _inputs(setting: str, name: str, value: Any) -> np.ndarray:
    """Return uint8 [M, ch, H, W], float32 [M, ...], or token ids [M, L] int32."""
    x = _to_array(setting, name, value)
    description = f"{setting}: {name} {list(x.shape)} of {x.dtype}"
    if x.ndim < 2 or not all(x.shape):
        raise ValueError(f"{description}: must be [samples, ...] with a number in every axis")
    if x.dtype.kind == "f":
        with np.errstate(over="ignore"):
            x = x.astype(np.float32, copy=False)
        _check_finite(setting, name, x)
        return _channels_first(x) if x.ndim == 4 else x
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        return x[:, None] if x.ndim == 3 else _channels_first(x)
    if x.dtype.kind in "iu" and x.dtype != np.uint8 and x.ndim == 2:
        if x.min() < 0 or x.max() >= 2**31 - 1:
            raise ValueError(
                f"{description}: token ids are from 0 to 2**31 - 2, these from {x.min()} to "
                f"{x.max()}; if they are features, convert them to float32"
            )
        return x.astype(np.int32, copy=False)
    raise ValueError(
        f"{description}: must be uint8 images [M, H, W] or [M, ch, H, W], floats, or token ids "
        "[M, L] of int64; convert it to uint8, float32 or int64"
    )


def _check_finite(setting: str, name: str, x: np.ndarray) -> None:
    for first in range(0, len(x), _BLOCK):
        is_finite = np.isfinite(x[first : first + _BLOCK])
        if not is_finite.all():
            row = first + int(np.argwhere(~is_finite)[0, 0])
            raise ValueError(
                f"{setting}: {name}[{row}] holds NaN, or a number that is infinite in float32; "
                "remove or replace it"
            )


def _channels_first(x: np.ndarray) -> np.ndarray:
    """Return images [M, ch, H, W]; channels come last only where that is unambiguous."""
    is_last = x.shape[3] in _IMAGE_CHANNELS and x.shape[1] not in _IMAGE_CHANNELS
    return x.transpose(0, 3, 1, 2) if is_last else x


def _to_tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.require(x, x.dtype.newbyteorder("="), ["C", "W"]))


def _identifiers(setting: str, name: str, value: Any, x_name: str, number: int) -> np.ndarray:
    """Return labels or clients, one for each sample: [M] int64 or text."""
    y = _to_array(setting, name, value)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y  # as Keras has them
    if y.dtype.kind == "O" and all(isinstance(item, str) for item in y.flat):
        y = y.astype(str)
    description = f"{setting}: {name} {list(y.shape)} of {y.dtype}"
    if y.ndim != 1 or y.dtype.kind not in "biuU":
        way_out = "; for other targets choose model.loss" if name.startswith("y_") else ""
        raise ValueError(f"{description}: must be [samples] of integers or texts{way_out}")
    if len(y) != number:
        raise ValueError(f"{description}: {x_name} has {number} samples; make the two agree")
    return y if y.dtype.kind == "U" else y.astype(np.int64)


def _number_labels(
    setting: str, labels: Sequence[np.ndarray], class_names: Any
) -> tuple[list[np.ndarray], tuple[str, ...], int, tuple[str, ...]]:
    """Return labels from 0 on both sides, the class names, the number of classes, and hints."""
    train, test = labels
    _check_one_type(setting, "y_train", "y_test", labels)
    if class_names is not None:
        names = [str(name) for name in _to_array(setting, "class_names", class_names).ravel()]
        return *_number_named(setting, labels, names), ()
    known = _sorted_unique(train)
    unknown = [label for label in _sorted_unique(test) if label not in set(known)]
    if unknown:
        raise ValueError(
            f"{setting}: y_test has the label {unknown[0]}, which y_train does not have; there "
            f"are {_join_shown(known)}; give class_names to declare all classes"
        )
    if known == [*range(len(known))]:
        return [train, test], (), len(known), ()
    class_of = {label: number for number, label in enumerate(known)}
    y = [np.array([class_of[label] for label in side.tolist()], np.int64) for side in labels]
    names = [str(label) for label in known]
    hints = similar_label_hints(setting, names)
    if train.dtype.kind != "U":
        last = len(known) - 1
        hints += (f"{setting}: labels {_join_shown(known)} are classes 0 to {last}, in this order",)
    return y, tuple(names), len(known), hints


def _number_named(
    setting: str, labels: Sequence[np.ndarray], names: Sequence[str]
) -> tuple[list[np.ndarray], tuple[str, ...], int]:
    """Return the labels as indices of the class names that the user gives."""
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"{setting}: class_names {_join_shown(names)}: name each class once")
    allowed = names if labels[0].dtype.kind == "U" else [*range(len(names))]
    class_of = {label: number for number, label in enumerate(allowed)}
    for name, side in zip(("y_train", "y_test"), labels, strict=True):
        unknown = [label for label in _sorted_unique(side) if label not in class_of]
        if unknown:
            raise ValueError(
                f"{setting}: {name} has the label {unknown[0]}, and class_names has "
                f"{len(names)} classes; the labels are 0 to {len(names) - 1}, or these names"
            )
    y = [np.array([class_of[label] for label in side.tolist()], np.int64) for side in labels]
    return y, tuple(names), len(names)


def _number_clients(
    setting: str, own: OwnData, sizes: tuple[int, int]
) -> tuple[tuple[np.ndarray, np.ndarray] | None, tuple[str, ...]]:
    """Return the client of each training and of each test sample, counted from 0, and hints."""
    if own.client_train is None and own.client_test is None:
        return None, ()
    if own.client_train is None or own.client_test is None:
        name = "client_test" if own.client_test is None else "client_train"
        raise ValueError(f"{setting}: has no {name}; give the clients of both sides, or of none")
    sides = [
        _identifiers(setting, f"client_{side}", getattr(own, f"client_{side}"), f"x_{side}", n)
        for side, n in zip(("train", "test"), sizes, strict=True)
    ]
    _check_one_type(setting, "client_train", "client_test", sides)
    known = _sorted_unique(np.concatenate(sides))
    if known == [*range(len(known))]:
        return (sides[0], sides[1]), ()
    number_of = {client: number for number, client in enumerate(known)}
    train, test = (
        np.array([number_of[client] for client in side.tolist()], np.int64) for side in sides
    )
    if known == [str(number) for number in range(len(known))]:
        return (train, test), ()
    hint = f"{setting}: {_join_shown(known)} are clients 0 to {len(known) - 1}, in this order"
    return (train, test), (hint,)


def _check_one_type(setting: str, name: str, other: str, sides: Sequence[np.ndarray]) -> None:
    if len({side.dtype.kind for side in sides}) > 1:
        raise ValueError(f"{setting}: one of {name} and {other} has texts, the other integers")


def _sorted_unique(values: np.ndarray) -> list:
    """Return the different values, sorted; texts that are all integers are sorted as numbers."""
    unique = np.unique(values).tolist()
    try:
        return sorted(unique, key=lambda value: (int(value), value))
    except ValueError:
        return unique


def _join_shown(values: Sequence) -> str:
    shown = ", ".join(" ".join(str(value).split()) for value in values[:_SHOWN])
    return f"{shown} ..." if len(values) > _SHOWN else shown


def _token_settings(
    setting: str, own: OwnData, x_train: np.ndarray, x_test: np.ndarray
) -> tuple[int, int]:
    """Return the number of token ids and the padding; (0, 0) for inputs that are no token ids."""
    given = {name: getattr(own, name) for name in ("tokens", "padding")}
    numbers = {}
    for name, value in given.items():
        array = None if value is None else _to_array(setting, name, value)
        if array is not None and (array.size != 1 or array.dtype.kind not in "iu"):
            raise ValueError(f"{setting}: {name} must be a single integer")
        numbers[name] = None if array is None else int(array.item())
    if x_train.dtype != np.int32:
        if name := next((n for n, number in numbers.items() if number is not None), ""):
            raise ValueError(
                f"{setting}: {name} = {numbers[name]}: x_train holds no token ids but "
                f"{x_train.dtype}; leave it out"
            )
        return 0, 0
    largest = int(max(x_train.max(), x_test.max()))
    padding = numbers["padding"] or 0
    tokens = max(largest, padding) + 1 if numbers["tokens"] is None else numbers["tokens"]
    if tokens <= largest:
        raise ValueError(
            f"{setting}: tokens = {tokens}: the largest token id in x is {largest}; ids count "
            "from 0"
        )
    if not 0 <= padding < tokens:
        raise ValueError(f"{setting}: padding = {padding}: must be from 0 to {tokens - 1}")
    return tokens, padding


def _normalisation(
    setting: str, own: OwnData, x: np.ndarray
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and standard deviation of each channel (the last axis, except of images)."""
    if own.mean is None and own.std is None:
        return (None, None) if x.dtype == np.uint8 else ((0.0,), (1.0,))
    if x.dtype == np.int32:
        raise ValueError(f"{setting}: mean and std do not go with token ids; leave them out")
    if own.mean is None or own.std is None:
        missing = "mean" if own.mean is None else "std"
        raise ValueError(f"{setting}: has no {missing}; give mean and std, or neither")
    channels = x.shape[1] if x.ndim == 4 else x.shape[-1]
    moments = []
    for name in ("mean", "std"):
        values = _to_array(setting, name, getattr(own, name)).ravel()
        if values.dtype.kind not in "fiu" or len(values) not in (1, channels):
            raise ValueError(
                f"{setting}: {name} must be one number, or {channels}, one for each channel"
            )
        values = values.astype(np.float64)
        if not np.isfinite(values).all() or (name == "std" and values.min() <= 0):
            rule = "finite and above 0" if name == "std" else "finite"
            raise ValueError(f"{setting}: {name} = {_join_shown(values.tolist())}: must be {rule}")
        moments.append(tuple(np.broadcast_to(values, channels).tolist()))
    return moments[0], moments[1]
