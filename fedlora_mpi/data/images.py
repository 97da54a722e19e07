"""Image files as RGB bytes, by one rule for all files of a data set.

No image is stretched by its own extremes. A file of 8 bits a channel is read as Pillow converts it
to RGB: grey becomes RGB, and transparency is dropped, which leaves the colours as they are stored.
EXIF's orientation is applied. A grey file of more bits has values from 0 to ``top``, which become
0 to 255:

    whole numbers   top = 255, 1023, 4095 or 65535, the first that no value of the data set exceeds
    other floats    top = 1; all values of all such files are in 0..1

Of 16-bit colours the higher 8 bits are read. Everything else is refused with the file's name, and
so is an image that would become one colour.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_TOPS = (255, 1023, 4095, 65535)
_ORIENTATION = 0x0112  # the tag of EXIF
_WAY_OUT = "save it with 8 bits a channel"


class Opened(NamedTuple):
    """The first image of a file, upright."""

    image: "Image"
    deep: bool  # 16 bits in each of several channels, of which Pillow reads the higher 8
    several: bool  # the file holds more images


class Wide(NamedTuple):
    """A grey file of more than 8 bits a pixel, and the values it has."""

    side: int
    row: int
    path: str
    low: float
    high: float
    whole: bool  # all values are whole numbers


class Decoded(NamedTuple):
    """The files of one side."""

    stack: np.ndarray  # [M, H, W, 3] uint8; black where a file is wide
    wide: list[Wide]
    deep: list[tuple[int, str]]  # of 16-bit colours: (the largest byte, path)
    several: list[str]  # files that hold more images than the first


def decode(
    sides: Sequence[Sequence[str]], size: int | None
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """The images [M, H, W, 3] uint8 in the files of each side, and hints for the user, a line each.

    They are resized to ``size`` pixels square unless it is None. Raises ValueError with the file's
    name: no image, a damaged one, one of another size than the first of its side, values that have
    no place in 0..255.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about notes beside the pixels
        found = [_decode_side(paths, side, size) for side, paths in enumerate(sides)]
        _check_deep([file for side in found for file in side.deep])
        wide = [file for side in found for file in side.wide]
        top = _find_top(wide)
        for file in wide:
            found[file.side].stack[file.row] = _resize(_narrow(file, top), size)
    several = [path for side in found for path in side.several]
    return [side.stack for side in found], _hints(wide, top, several)


def _decode_side(paths: Sequence[str], side: int, size: int | None) -> Decoded:
    stack, wide, deep, several = None, [], [], []
    for row, path in enumerate(paths):
        opened = _open(path)
        if _is_wide(opened.image):
            wide.append(_measure(opened.image, side, row, path))
            # It keeps the place until the values of all files are known.
            pixels = _resize(_blank(opened.image.size), size)
        else:
            pixels = _resize(_to_rgb(opened, path), size)
        if opened.deep:
            deep.append((int(pixels.max()), path))
        if opened.several:
            several.append(path)
        stack = np.empty((len(paths), *pixels.shape), np.uint8) if stack is None else stack
        _check_shape(pixels, stack, path)
        stack[row] = pixels
    return Decoded(stack, wide, deep, several)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Say which file cannot be read."""
    try:
        yield
    except Exception as error:  # of many kinds
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"data.root: {path} is no image, or damaged ({why}); {_WAY_OUT}, or remove it"
        ) from error


def _open(path: str) -> Opened:
    from PIL import Image

    with _naming(path), Image.open(path) as file:
        several = bool(getattr(file, "is_animated", False))
        modes = [tile[3][0] if isinstance(tile[3], tuple) else tile[3] for tile in file.tile]
        file.load()
        deep = len(file.getbands()) > 1 and any(";16" in str(mode) for mode in modes)
        return Opened(_turn_upright(file), deep, several)


def _turn_upright(image: "Image") -> "Image":
    """By the orientation in EXIF. Damaged notes are ignored, for the pixels beside them are whole."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(_ORIENTATION))
    except Exception:  # of many kinds
        turn = None
    return image if turn is None else image.transpose(turn)


def _is_wide(image: "Image") -> bool:
    return image.mode == "F" or image.mode.split(";")[0] == "I"


def _to_rgb(opened: Opened, path: str) -> "Image":
    """Of an image of 8 bits a channel. Raises ValueError when that leaves one colour of several."""
    image = opened.image
    with _naming(path):
        rgb = image.convert("RGB")
        source = image.convert("RGBA") if image.mode in ("P", "PA") else image
    if _is_constant(rgb) and (opened.deep or not _is_constant(source)):
        lost = "in the lower 8 of its 16 bits" if opened.deep else f"as {image.mode}"
        raise ValueError(
            f"data.root: {path} shows something {lost}, of which RGB has one colour left; "
            "save it as RGB with 8 bits a channel, without transparency"
        )
    return rgb


def _is_constant(image: "Image") -> bool:
    extrema = image.getextrema()  # of one channel a pair, of several a pair each
    pairs = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return all(low == high for low, high in pairs)


def _measure(image: "Image", side: int, row: int, path: str) -> Wide:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    whole = bool((values == np.rint(values)).all())
    if not (low >= 0 and high <= (_TOPS[-1] if whole else 1)):
        kind = f"values from {low:g} to {high:g}" + ("" if whole else ", not whole numbers")
        read = f"read are whole numbers from 0 to {_TOPS[-1]}, and floats from 0 to 1"
        raise ValueError(f"data.root: {path} has {kind}; {read}; {_WAY_OUT}")
    return Wide(side, row, path, low, high, whole)


def _find_top(files: Sequence[Wide]) -> int:
    """The value that becomes 255. Raises ValueError when some files say 1 and others more."""
    fractions = next((file for file in files if not file.whole), None)
    highest = max(files, key=lambda file: file.high, default=None)
    if fractions and highest.high > 1:
        other = f"{highest.path} whole numbers up to {highest.high:g}"
        raise ValueError(
            f"data.root: {fractions.path} has floats from 0 to 1, {other}; save all with 8 bits a "
            "channel"
        )
    if fractions or not files:
        return 1
    return next(top for top in _TOPS if top >= highest.high)


def _narrow(file: Wide, top: int) -> "Image":
    """The values of a file as bytes. Raises ValueError where they all become one."""
    from PIL import Image

    values = np.asarray(_open(file.path).image).astype(np.float64)
    pixels = np.rint(values * 255 / top).astype(np.uint8)
    if file.low < file.high and pixels.min() == pixels.max():
        raise ValueError(
            f"data.root: {file.path} has values from {file.low:g} to {file.high:g}, which are one "
            f"in the 256 steps from 0 to {top}; {_WAY_OUT}"
        )
    return Image.fromarray(pixels).convert("RGB")


def _check_deep(files: Sequence[tuple[int, str]]) -> None:
    """Raise ValueError when no file of 16-bit colours uses more than 12 bits: too few are read."""
    highest, path = max(files, default=(255, ""))
    if highest <= 4095 >> 8:
        found = f"{path} and all others of 16 bits a channel use the lower 12 bits alone"
        raise ValueError(f"data.root: {found}, and the higher 8 are read; {_WAY_OUT}")


def _resize(image: "Image", size: int | None) -> np.ndarray:
    """The pixels [H, W, 3] of an RGB image."""
    from PIL import Image

    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR) if size else image)


def _blank(size: tuple[int, int]) -> "Image":
    from PIL import Image

    return Image.new("RGB", size)


def _check_shape(pixels: np.ndarray, stack: np.ndarray, path: str) -> None:
    if pixels.shape != stack.shape[1:]:
        have, first = ("{1} x {0}".format(*shape) for shape in (pixels.shape, stack.shape[1:]))
        raise ValueError(
            f"data.image_size = null: {path} is {have} pixels, the first image is {first}; "
            "set data.image_size"
        )


def _hints(wide: Sequence[Wide], top: int, several: Sequence[str]) -> tuple[str, ...]:
    lines = []
    if wide:
        files = f"{len(wide)} of the files, which have more than 8 bits (first: {wide[0].path})"
        lines.append(f"data.root: 0..{top} became 0..255 in {files}")
    if several:
        files = f"{len(several)} of the files, which hold several (first: {several[0]})"
        lines.append(f"data.root: the first image is read of {files}")
    return tuple(lines)
