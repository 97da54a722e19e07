"""A vision Transformer that classifies images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transformer import Block


class Embedding(nn.Module):
    """The tokens of an image: a class token, then a Linear of each patch, plus positions."""

    def __init__(self, channels: int, patches: int, *, patch: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.places = nn.Embedding(1 + patches, width)
        with torch.no_grad():
            self.places.weight *= 0.02  # N(0, 0.02^2)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [B, 1 + patches, width] of images x [B, ch, H, W]."""
        z = self.patches(x).flatten(2).transpose(1, 2)  # [B, patches, width]
        first = self.class_token.expand(len(x), 1, -1)
        return torch.cat([first, z], 1) + self.places.weight


class VisionTransformer(nn.Module):
    """Tokens of square patches, blocks, a norm, a Linear of the class token.

    Source: Dosovitskiy et al., ICLR 2021; start of the class token and of the positions as there.
    ``patches``: number of patches of an image.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        patches: int,
        *,
        patch: int,
        width: int,
        heads: int,
        layers: int,
        feedforward: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = Embedding(channels, patches, patch=patch, width=width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads, feedforward, dropout, F.gelu) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, classes] of images x [B, ch, H, W]."""
        z = self.dropout(self.embedding(x))
        for block in self.blocks:
            z = block(z)
        return self.head(self.norm(z[:, 0]))
