"""Hold the training or the test set on the training device, one class per kind of input.

Each class holds labels [M], or other targets [M, k], and the inputs in their most compact form.
``read`` gathers samples of clients in the form that a network takes. The rest of the feed only
handles indices.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .datasets import Data
from .samples import Samples
from .transforms import warp


class Store(Protocol):
    """A set from which an epoch reads its samples."""

    @property
    def sample_numel(self) -> int:
        """How many numbers a sample has when it is read."""

    def read(self, rows: Tensor, warps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return inputs [C, B, ...] and labels [C, B] of the samples ``rows`` [C, B]; other targets
        are [C, B, k].
        """


class Images(NamedTuple):
    """Images of P = H * W * ch numbers, channels last.

    Bytes are read as (x / 255 - mean) / std, floats as (x - mean) / std.
    """

    images: Tensor  # [M, H, W, ch] uint8 or float32
    labels: Tensor  # [M] int64, or [M, k] float32
    # One long row each: on a CPU, broadcasting over a last axis of three channels takes eight times
    # as long.
    scale: Tensor  # [P] 1 / (255 std) of each number's channel, 1 / std for floats
    offset: Tensor  # [P] -mean / std of each number's channel

    @property
    def sample_numel(self) -> int:
        """How many numbers a sample has when it is read: P."""
        return len(self.scale)

    def read(self, rows: Tensor, warps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return normalised images [C, B, ch, H, W] in channels_last and labels [C, B].

        ``rows`` [C, B] are indices; ``warps`` are the parameters of ``transforms.warp``.
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
    """Texts as token ids, padding included."""

    tokens: Tensor  # [M, L] int32
    labels: Tensor  # [M] int64, or [M, k] float32

    @property
    def sample_numel(self) -> int:
        """How many numbers a sample has when it is read: L."""
        return self.tokens.shape[1]

    def read(self, rows: Tensor, warps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return token ids [C, B, L] int64 and labels [C, B] of the samples ``rows`` [C, B].

        ``warps`` must be empty.
        """
        assert not warps, f"warps of texts: {', '.join(warps)}"
        return self.tokens[rows].long(), self.labels[rows]


class Numbers(NamedTuple):
    """Float inputs of any shape, normalised: feature vectors or sequences."""

    values: Tensor  # [M, ...] float32
    labels: Tensor  # [M] int64, or [M, k] float32

    @property
    def sample_numel(self) -> int:
        """How many numbers a sample has when it is read."""
        return self.values[0].numel()

    def read(self, rows: Tensor, warps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return inputs [C, B, ...] and labels [C, B] of the samples ``rows`` [C, B].

        ``warps`` must be empty.
        """
        assert not warps, f"warps of numbers: {', '.join(warps)}"
        return self.values[rows], self.labels[rows]


AnyStore = Images | Texts | Numbers


def build_store(data: Data, samples: Samples, device: torch.device) -> AnyStore:
    """Return ``samples``, a side of ``data``, on ``device``."""
    labels = samples.y.to(device)
    if data.tokens:
        return Texts(samples.x.to(device), labels)
    if not data.has_images:
        moments = (torch.tensor(v) for v in (data.mean, data.std))
        mean_value, std_value = (v.float() for v in moments)
        return Numbers(((samples.x - mean_value) / std_value).to(device), labels)
    images = samples.x.permute(0, 2, 3, 1).contiguous().to(device)
    mean, std = np.array(data.mean), np.array(data.std)
    pixels = images[0].numel() // len(mean)
    top = 255 if images.dtype == torch.uint8 else 1
    scale, offset = (np.tile(v, pixels) for v in (1 / (top * std), -mean / std))
    return Images(
        images, labels, *(torch.from_numpy(v).float().to(device) for v in (scale, offset))
    )


def permute_inputs(store: AnyStore, rng: torch.Generator) -> Images | Numbers:
    """Return ``store`` with the numbers of every sample in one other order.

    Images: the pixels change places, with their channels; vectors and sequences: the features do.
    Raises ValueError for texts.
    """
    if isinstance(store, Images):
        pixels = store.images.flatten(1, 2)
        order = torch.randperm(pixels.shape[1], generator=rng).to(pixels.device)
        return store._replace(images=pixels[:, order].view_as(store.images))
    if isinstance(store, Texts):
        raise ValueError("permute: needs numbers or images, these are texts")
    order = torch.randperm(store.values.shape[-1], generator=rng).to(store.values.device)
    return store._replace(values=store.values[..., order])


def rotate_inputs(store: AnyStore, rng: torch.Generator) -> Numbers:
    """Return ``store`` with every vector x [F] turned to Q x, for a random orthogonal Q [F, F].

    Sequences [L, F] are turned at every step. Q is uniform (Haar): the Q of a QR factorisation of
    Gaussian numbers, with R's diagonal made positive. Raises ValueError for images and texts.
    """
    if not isinstance(store, Numbers):
        kind = "images" if isinstance(store, Images) else "texts"
        raise ValueError(f"rotate_inputs: needs feature vectors, these are {kind}")
    width = store.values.shape[-1]
    gaussian = torch.randn(width, width, dtype=torch.float64, generator=rng)
    q, r = torch.linalg.qr(gaussian)
    rotation = (q * r.diagonal().sign()).T.float().to(store.values.device)
    return store._replace(values=store.values @ rotation)
