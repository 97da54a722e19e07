"""Training augmentation as tensor operations on a batch, with one set of parameters per sample.

Images are [B, H, W, ch], the layout in which ``inputs.py`` stores them. The transforms only move
and hide pixels. They are composed as coordinates, so the images are read once.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor

PAD = 4  # pixels of black border, as in torchvision's RandomCrop(size, padding=4)
MAX_DEGREES = 15.0  # as in RandomRotation(15)
ERASE_AREA, ERASE_RATIO = (0.04, 0.2), (0.5, 2.0)  # as in RandomErasing(scale=AREA, ratio=RATIO)
_ATTEMPTS = 10  # RandomErasing's attempts to find a rectangle that is smaller than the image


def draw_parameters(
    names: Iterable[str], number: int, rng: Generator, size: Sequence[int]
) -> dict[str, Tensor]:
    """Return the parameters of the named transforms for ``number`` samples.

    They have the same distribution as in torchvision. size: (H, W) of the images. crop and
    crop_mean [number, 2] int64: rows and columns by which the window moves. flip [number] bool.
    rotate [number]: degrees, counter-clockwise. erase [number, 4] int64: top, left, height and
    width of a rectangle; about half of them have height and width 0.
    """
    names = tuple(names)
    drawn = {
        "crop": torch.randint(-PAD, PAD + 1, (number, 2), generator=rng),
        "flip": torch.rand(number, generator=rng) < 0.5,
        "rotate": (2 * torch.rand(number, generator=rng) - 1) * MAX_DEGREES,
    }
    drawn["crop_mean"] = drawn["crop"]
    if "erase" in names:
        drawn["erase"] = _draw_rectangles(number, rng, *size)
    return {name: drawn[name] for name in names}


def _draw_rectangles(number: int, rng: Generator, height: int, width: int) -> Tensor:
    """Return rectangles [number, 4]: top, left, height, width.

    A rectangle is RandomErasing's first attempt that fits. Height and width are 0 if none fits or
    if, with probability 1/2, nothing is erased.
    """

    def uniform(low, high):
        return low + (high - low) * torch.rand(number, _ATTEMPTS, generator=rng)

    area = height * width * uniform(*ERASE_AREA)
    aspect = uniform(*map(math.log, ERASE_RATIO)).exp()
    # [number, attempts, 2]
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 2).round().long()
    full = torch.tensor([height, width])
    fits = (sides < full).all(2)
    first = fits.int().argmax(1)
    side = sides[torch.arange(number), first]
    corner = (torch.rand(number, 2, generator=rng) * (full - side + 1)).long().minimum(full - side)
    is_erased = (torch.rand(number, generator=rng) < 0.5) & fits.any(1)
    return torch.cat([corner, side * is_erased[:, None]], 1)


def warp(x: Tensor, **parameters: Tensor) -> tuple[Tensor, Tensor | None]:
    """Turn, erase, crop, flip and rotate images [B, H, W, ch], in this order.

    Returns the images and a mask [B, H, W] of the visible pixels. The mask is False where ``erase``
    or ``crop_mean`` show the mean colour, whose value is 0 after normalisation. It is None without
    these two. ``turn`` [B] is a multiple of 90 degrees (square images; no pixel is lost). The other
    parameters are as in ``draw_parameters``. Pixels from outside the image are black. The result
    equals that of torchvision's functions with nearest-neighbour interpolation.
    """
    hiding_transforms = {"erase", "crop_mean"} & parameters.keys()
    pixel, inside, visible = _source_pixels(x.shape, x.device, **parameters)
    moved = x.reshape(-1, x.shape[3]).index_select(0, pixel.flatten()).view(x.shape)
    return moved * inside[..., None], visible.expand(pixel.shape) if hiding_transforms else None


def _source_pixels(
    shape: Sequence[int],
    device: torch.device,
    *,
    turn: Tensor | None = None,
    erase: Tensor | None = None,
    crop: Tensor | None = None,
    crop_mean: Tensor | None = None,
    flip: Tensor | None = None,
    rotate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors that describe every pixel of the result, [B, H, W] or broadcast to it.

    They are the index of its source among the pixels of all images, whether the source lies inside
    the image (else it is black), and whether the pixel is visible (else it has the mean colour).
    """
    batch, height, width, _ = shape
    row = torch.arange(height, device=device)[None, :, None]
    col = torch.arange(width, device=device)[None, None, :]
    inside = visible = torch.ones((), dtype=torch.bool, device=device)
    # row and col [B, H, W]: the source of a pixel of the result. Transforms are traced backwards.
    if rotate is not None:
        row, col = _rotate_pixels(row, col, rotate, height, width)
        inside = _is_within(row, height) & _is_within(col, width)
    if flip is not None:
        col = torch.where(flip[:, None, None], width - 1 - col, col)
    if crop is not None:
        row, col = row + crop[:, 0, None, None], col + crop[:, 1, None, None]
        inside = inside & _is_within(row, height) & _is_within(col, width)
    if crop_mean is not None:
        row, col = row + crop_mean[:, 0, None, None], col + crop_mean[:, 1, None, None]
        visible = visible & _is_within(row, height) & _is_within(col, width)
    if erase is not None:
        top, left, high, wide = erase[:, :, None, None].unbind(1)
        visible = visible & ~(_is_within(row - top, high) & _is_within(col - left, wide))
    if turn is not None:
        row, col = _rotate_pixels(row, col, turn, height, width)
    image = torch.arange(batch, device=device)[:, None, None] * (height * width)
    pixel = image + row.clamp(0, height - 1) * width + col.clamp(0, width - 1)  # [B, H, W]
    return pixel, inside, visible


def _rotate_pixels(
    row: Tensor, col: Tensor, degrees: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return the pixel that a counter-clockwise rotation about the centre moves to (row, col).

    It is rounded to the nearest pixel and may lie outside the image.
    """
    angle = torch.deg2rad(degrees)[:, None, None]
    y, x = row - (height - 1) / 2, col - (width - 1) / 2
    from_y = angle.sin() * x + angle.cos() * y + (height - 1) / 2
    from_x = angle.cos() * x - angle.sin() * y + (width - 1) / 2
    return from_y.round().long(), from_x.round().long()


def _is_within(index: Tensor, size: int | Tensor) -> Tensor:
    return (index >= 0) & (index < size)
