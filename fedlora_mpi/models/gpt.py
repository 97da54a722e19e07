"""A small causal Transformer that predicts the next token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packing import unpack


class CausalBlock(nn.Module):
    """Causal self-attention, then a feedforward network, each after a norm and with a residual.

    Source: Radford et al. 2019 (GPT-2). Query, key and value are Linears of their own, so that each
    can have a low-rank part.
    """

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Return the block's output [B, L, width] for x [B, L, width].

        hidden: whether a position does not see another one, [L, L] or [B, 1, L, L].
        """
        z = self.norm1(x)
        query, key, value = (
            layer(z).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for layer in (self.query, self.key, self.value)
        )  # [B, heads, L, width / heads]
        # plain products, which vmap and the FLOP counter support
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        shares = self.dropout(scores.masked_fill(hidden, float("-inf")).softmax(-1))
        x = x + self.dropout(self.out((shares @ value).transpose(-3, -2).flatten(-2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Embeddings of tokens plus positions, causal blocks, a norm, and a Linear over the tokens.

    ``tied``: this Linear has the weights of the embeddings of tokens.
    """

    def __init__(
        self,
        length: int,
        tokens: int,
        *,
        width: int,
        heads: int,
        layers: int,
        feedforward: int,
        dropout: float,
        tied: bool,
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            CausalBlock(width, heads, feedforward, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        if tied:
            self.head.weight = self.words.weight
        with torch.no_grad():
            for embedding in (self.words, self.places):
                embedding.weight *= 0.02  # N(0, 0.02^2), as in GPT-2

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the next token [B, L, tokens] for token ids x [B, L].

        A position sees itself and those before it, so padding at the end changes nothing.
        """
        length = x.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        return self._logits(x, torch.arange(length, device=x.device), future)

    def _logits(self, ids: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits for token ids [B, L] at ``positions`` [L] or [B, L].

        hidden: as in ``CausalBlock``.
        """
        z = self.dropout(self.words(ids) + self.places(positions))
        for block in self.blocks:
            z = block(z, hidden)
        return self.head(self.norm(z))


class PackedGPT(GPT):
    """A GPT whose inputs are rows of several texts, see ``packing``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the next token [B, L, tokens] for packed token ids x [B, L]."""
        texts = unpack(x, self.words.num_embeddings)
        return self._logits(texts.ids, texts.positions, ~texts.visible[:, None])
