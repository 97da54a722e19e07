"""The training or the test set on the device that trains, one class per kind of input.

Each is labels [M] and the inputs in the form that costs least to keep; ``read`` gathers samples of
clients in the form that a network takes. The rest of the feed knows of indices alone.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .datasets import Data, Samples
from .transforms import warp


class Store(Protocol):
    """A set that an epoch reads its samples from."""

    @property
    def sample_numel(self) -> int:
        """Numbers of a sample as it is read."""

    def read(self, rows: Tensor, warps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The samples ``rows`` [C, B]: inputs [C, B, ...] and labels [C, B]."""


class Images(NamedTuple):
    """Bytes with the channels last, P = H * W * ch numbers each; read as (x / 255 - mean) / std."""

    images: Tensor  # [M, H, W, ch] uint8
    labels: Tensor  # [M] int64
    # One long row each: a CPU takes eight times as long to broadcast over a last axis of three
    # channels.
    scale: Tensor  # [P] 1 / (255 std) of each number's channel
    offset: Tensor  # [P] -mean / std of each number's channel

    @property
    def sample_numel(self) -> int:
        """Of a sample as it is read: P."""
        return len(self.scale)

    def read(self, rows: Tensor, warps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The samples ``rows`` [C, B]: normalised images [C, B, ch, H, W] in channels_last, labels
        [C, B].
        """
        _, height, width, channels = self.images.shape
        flat, visible = self.images.flatten(1).index_select(0, rows.flatten()), None  # [C * B, P]
        if warps:
            images = flat.view(-1, height, width, channels)
            images, visible = warp(
                images, **{name: value.flatten(0, 1) for name, value in warps.items()}
            )
            flat = images.flatten(1)
        x = flat.to(torch.float32, copy=True).mul_(self.scale).add_(self.offset)
        if visible is not None:
            x.mul_(visible.flatten(1).repeat_interleave(channels, 1))
        return x.view(*rows.shape, height, width, channels).permute(0, 1, 4, 2, 3), self.labels[
            rows
        ]


class Texts(NamedTuple):
    """Token ids, those of padding behind a text included."""

    tokens: Tensor  # [M, L] int32
    labels: Tensor  # [M] int64

    @property
    def sample_numel(self) -> int:
        """Of a sample as it is read: L."""
        return self.tokens.shape[1]

    def read(self, rows: Tensor, warps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The samples ``rows`` [C, B]: token ids [C, B, L] int64, labels [C, B]; nothing warps a
        text.
        """
        assert not warps, f"warps of texts: {', '.join(warps)}"
        return self.tokens[rows].long(), self.labels[rows]


def build_store(data: Data, samples: Samples, device: torch.device) -> Images | Texts:
    """One side of ``data`` on ``device``."""
    labels = samples.y.to(device)
    if data.vocabulary:
        return Texts(samples.x.to(device), labels)
    images = samples.x.permute(0, 2, 3, 1).contiguous().to(device)
    mean, std = np.array(data.mean), np.array(data.std)
    pixels = images[0].numel() // len(mean)
    scale, offset = (np.tile(v, pixels) for v in (1 / (255 * std), -mean / std))
    return Images(
        images, labels, *(torch.from_numpy(v).float().to(device) for v in (scale, offset))
    )
