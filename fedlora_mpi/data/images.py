"""Read image files as RGB bytes, by one rule for all files of a data set.

No image is stretched to its own minimum and maximum. A file with 8 bits per channel is converted to
RGB by Pillow: grey becomes RGB, and transparency is dropped while the stored colours are kept.
EXIF's orientation is applied. In a grey file with more bits, the values 0 to ``top`` become 0 to
255:

    whole numbers   top = 255, 1023, 4095 or 65535, the first that no value of the data set exceeds
    other floats    top = 1; all values of all such files are in 0..1

Of 16-bit colours the higher 8 bits are read. Every other file raises an error with its name, and so
does an image whose different colours would become a single one.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_WHITE_LEVELS = (255, 1023, 4095, 65535)
_ORIENTATION = 0x0112  # EXIF tag
_REMEDY = "save it with 8 bits a channel"


class OpenedImage(NamedTuple):
    """The first image of a file, upright."""

    image: "Image"
    is_16_bit: bool  # several channels of 16 bits each; Pillow reads the higher 8
    has_several_images: bool  # the file holds further images


class WideGrayFile(NamedTuple):
    """A grey file with more than 8 bits per pixel, and the range of its values."""

    side: int
    row: int
    path: str
    low: float
    high: float
    is_integer: bool  # all values are whole numbers


class DecodedSide(NamedTuple):
    """The decoded files of the training or the test set."""

    stack: np.ndarray  # [M, H, W, 3] uint8; black for the files in ``wide_files``
    wide_files: list[WideGrayFile]
    deep_files: list[tuple[int, str]]  # (largest byte, path) of files with 16-bit colours
    multi_image_files: list[str]  # files that hold more than one image


def decode_images(
    sides: Sequence[Sequence[str]], size: int | None
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Return the images [M, H, W, 3] uint8 of each side, and hints for the user, one line each.

    Images are resized to ``size`` x ``size`` pixels unless ``size`` is None. Raises ValueError with
    the file's name if a file is no image or damaged, if its size differs from the first of its
    side, or if its values cannot be mapped to 0..255.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about damaged metadata
        decoded = [_decode_side(paths, side, size) for side, paths in enumerate(sides)]
        _check_16_bit([file for side in decoded for file in side.deep_files])
        wide_files = [file for side in decoded for file in side.wide_files]
        white_level = _find_white_level(wide_files)
        for file in wide_files:
            decoded[file.side].stack[file.row] = _resize(_to_8_bit(file, white_level), size)
    multi_image_files = [path for side in decoded for path in side.multi_image_files]
    return [side.stack for side in decoded], _hints(wide_files, white_level, multi_image_files)


def _decode_side(paths: Sequence[str], side: int, size: int | None) -> DecodedSide:
    stack: np.ndarray | None = None
    wide_files: list[WideGrayFile] = []
    deep_files: list[tuple[int, str]] = []
    multi_image_files: list[str] = []
    for row, path in enumerate(paths):
        opened = _open_image(path)
        if _is_wide_gray(opened.image):
            wide_files.append(_measure_values(opened.image, side, row, path))
            # A placeholder until the values of all files are known.
            pixels = _resize(_blank_image(opened.image.size), size)
        else:
            pixels = _resize(_to_rgb(opened, path), size)
        if opened.is_16_bit:
            deep_files.append((int(pixels.max()), path))
        if opened.has_several_images:
            multi_image_files.append(path)
        stack = np.empty((len(paths), *pixels.shape), np.uint8) if stack is None else stack
        _check_shape(pixels, stack, path)
        stack[row] = pixels
    assert stack is not None, "no files"
    return DecodedSide(stack, wide_files, deep_files, multi_image_files)


@contextmanager
def _report_bad_file(path: str) -> Iterator[None]:
    """Turn any error into a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # Pillow raises many types
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"data.root: {path} is no image, or damaged ({why}); {_REMEDY}, or remove it"
        ) from error


def _open_image(path: str) -> OpenedImage:
    from PIL import Image

    with _report_bad_file(path), Image.open(path) as file:
        has_several_images = bool(getattr(file, "is_animated", False))
        modes = [tile[3][0] if isinstance(tile[3], tuple) else tile[3] for tile in file.tile]
        file.load()
        is_16_bit = len(file.getbands()) > 1 and any(";16" in str(mode) for mode in modes)
        return OpenedImage(_turn_upright(file), is_16_bit, has_several_images)


def _turn_upright(image: "Image") -> "Image":
    """Return the image turned by EXIF's orientation; damaged EXIF data are ignored."""
    from PIL.Image import Transpose

    turns: dict[int | None, Transpose] = {
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
    except Exception:  # Pillow raises many types
        turn = None
    return image if turn is None else image.transpose(turn)


def _is_wide_gray(image: "Image") -> bool:
    return image.mode == "F" or image.mode.split(";")[0] == "I"


def _to_rgb(opened: OpenedImage, path: str) -> "Image":
    """Convert an opened image to RGB; raise ValueError if several colours would become one."""
    image = opened.image
    with _report_bad_file(path):
        rgb = image.convert("RGB")
        source = image.convert("RGBA") if image.mode in ("P", "PA") else image
    if _is_constant(rgb) and (opened.is_16_bit or not _is_constant(source)):
        where_lost = "in the lower 8 of its 16 bits" if opened.is_16_bit else f"as {image.mode}"
        raise ValueError(
            f"data.root: {path} shows something {where_lost}, of which RGB has one colour left; "
            "save it as RGB with 8 bits a channel, without transparency"
        )
    return rgb


def _is_constant(image: "Image") -> bool:
    extrema = image.getextrema()  # one pair for one channel, else a tuple of pairs
    pairs = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return all(low == high for low, high in pairs)


def _measure_values(image: "Image", side: int, row: int, path: str) -> WideGrayFile:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    is_integer = bool((values == np.rint(values)).all())
    if not (low >= 0 and high <= (_WHITE_LEVELS[-1] if is_integer else 1)):
        kind = f"values from {low:g} to {high:g}" + ("" if is_integer else ", not whole numbers")
        read = f"read are whole numbers from 0 to {_WHITE_LEVELS[-1]}, and floats from 0 to 1"
        raise ValueError(f"data.root: {path} has {kind}; {read}; {_REMEDY}")
    return WideGrayFile(side, row, path, low, high, is_integer)


def _find_white_level(files: Sequence[WideGrayFile]) -> int:
    """Return the value that becomes 255.

    Raises ValueError if some files have fractions from 0 to 1 and others have values above 1.
    """
    fractions = next((file for file in files if not file.is_integer), None)
    highest = max(files, key=lambda file: file.high, default=None)
    if fractions and highest and highest.high > 1:
        contradiction = f"{highest.path} whole numbers up to {highest.high:g}"
        raise ValueError(
            f"data.root: {fractions.path} has floats from 0 to 1, {contradiction}; save all with "
            "8 bits a channel"
        )
    if fractions or highest is None:
        return 1
    return next(level for level in _WHITE_LEVELS if level >= highest.high)


def _to_8_bit(file: WideGrayFile, white_level: int) -> "Image":
    """Return the values of a file as bytes; raise ValueError if different values all become one."""
    from PIL import Image

    values = np.asarray(_open_image(file.path).image).astype(np.float64)
    pixels = np.rint(values * 255 / white_level).astype(np.uint8)
    if file.low < file.high and pixels.min() == pixels.max():
        raise ValueError(
            f"data.root: {file.path} has values from {file.low:g} to {file.high:g}, which are one "
            f"in the 256 steps from 0 to {white_level}; {_REMEDY}"
        )
    return Image.fromarray(pixels).convert("RGB")


def _check_16_bit(files: Sequence[tuple[int, str]]) -> None:
    """Raise ValueError if no file of 16-bit colours uses more than 12 bits.

    Only the higher 8 bits are read, so at most 4 of these 12 bits would remain.
    """
    highest, path = max(files, default=(255, ""))
    if highest <= 4095 >> 8:
        problem = f"{path} and all others of 16 bits a channel use the lower 12 bits alone"
        raise ValueError(f"data.root: {problem}, and the higher 8 are read; {_REMEDY}")


def _resize(image: "Image", size: int | None) -> np.ndarray:
    """Return the pixels [H, W, 3] of an RGB image, resized to ``size`` if it is given."""
    from PIL import Image

    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR) if size else image)


def _blank_image(size: tuple[int, int]) -> "Image":
    from PIL import Image

    return Image.new("RGB", size)


def _check_shape(pixels: np.ndarray, stack: np.ndarray, path: str) -> None:
    if pixels.shape != stack.shape[1:]:
        size, first_size = ("{1} x {0}".format(*shape) for shape in (pixels.shape, stack.shape[1:]))
        raise ValueError(
            f"data.image_size = null: {path} is {size} pixels, the first image is {first_size}; "
            "set data.image_size"
        )


def _hints(
    wide_files: Sequence[WideGrayFile], white_level: int, multi_image_files: Sequence[str]
) -> tuple[str, ...]:
    lines = []
    if wide_files:
        first = wide_files[0].path
        files = f"{len(wide_files)} of the files, which have more than 8 bits (first: {first})"
        lines.append(f"data.root: 0..{white_level} became 0..255 in {files}")
    if multi_image_files:
        first = multi_image_files[0]
        files = f"{len(multi_image_files)} of the files, which hold several (first: {first})"
        lines.append(f"data.root: the first image is read of {files}")
    return tuple(lines)
