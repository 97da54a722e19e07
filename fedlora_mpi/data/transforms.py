"""Training augmentation as tensor operations on a batch, with one set of parameters per sample.

Images are [B, H, W, ch], the layout in which ``feed.py`` stores them. The transforms only move pixels,
so they are composed as coordinates and the images are read once.
"""

from collections.abc import Iterable

import torch
from torch import Generator, Tensor

PAD = 4  # pixels of black border from which torchvision's RandomCrop(size, padding=4) cuts
DEGREES = 15.0  # of RandomRotation(15)


def draw(names: Iterable[str], number: int, rng: Generator) -> dict[str, Tensor]:
    """Parameters of ``number`` samples for the named transforms, distributed as torchvision draws them.

    crop [number, 2] int64: rows and columns by which the window moves; flip [number] bool;
    rotate [number] degrees, counter-clockwise.
    """
    drawn = {
        "crop": torch.randint(-PAD, PAD + 1, (number, 2), generator=rng),
        "flip": torch.rand(number, generator=rng) < 0.5,
        "rotate": (2 * torch.rand(number, generator=rng) - 1) * DEGREES,
    }
    return {name: drawn[name] for name in names}


def warp(
    x: Tensor,
    *,
    turn: Tensor | None = None,
    crop: Tensor | None = None,
    flip: Tensor | None = None,
    rotate: Tensor | None = None,
) -> Tensor:
    """Turn, crop, flip and rotate images [B, H, W, ch], in this order; what comes from outside is black.

    ``turn`` [B] is a multiple of 90 degrees (square images, no pixel is lost); the others are as in
    ``draw``. Pixels are those of torchvision's functions with nearest-neighbour interpolation.
    """
    batch, height, width, channels = x.shape
    row = torch.arange(height, device=x.device)[None, :, None]
    col = torch.arange(width, device=x.device)[None, None, :]
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    # From here on row and col [B, H, W] say where a pixel of the result comes from: last transform first.
    if rotate is not None:
        row, col = _turned(row, col, rotate, height, width)
        inside = _within(row, height) & _within(col, width)
    if flip is not None:
        col = torch.where(flip[:, None, None], width - 1 - col, col)
    if crop is not None:
        row, col = row + crop[:, 0, None, None], col + crop[:, 1, None, None]
        inside = inside & _within(row, height) & _within(col, width)
    if turn is not None:
        row, col = _turned(row, col, turn, height, width)
    image = torch.arange(batch, device=x.device)[:, None, None] * (height * width)
    pixel = image + row.clamp(0, height - 1) * width + col.clamp(0, width - 1)  # [B, H, W]
    moved = x.reshape(-1, channels).index_select(0, pixel.flatten()).view(x.shape)
    return moved * inside[..., None]


def _turned(row: Tensor, col: Tensor, degrees: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Nearest pixel from which a counter-clockwise rotation about the centre takes (row, col)."""
    angle = torch.deg2rad(degrees)[:, None, None]
    y, x = row - (height - 1) / 2, col - (width - 1) / 2
    from_y = angle.sin() * x + angle.cos() * y + (height - 1) / 2
    from_x = angle.cos() * x - angle.sin() * y + (width - 1) / 2
    return from_y.round().long(), from_x.round().long()


def _within(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)
