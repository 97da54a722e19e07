"""A small causal Transformer that predicts the next token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output [B, L, width] for x [B, L, width]."""
        z = self.norm1(x)
        query, key, value = (
            layer(z).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for layer in (self.query, self.key, self.value)
        )  # [B, heads, L, width / heads]
        # plain products, which vmap and the FLOP counter support
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        future = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)
        shares = self.dropout(scores.masked_fill(future, float("-inf")).softmax(-1))
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
        z = self.dropout(self.words(x) + self.places(torch.arange(x.shape[1], device=x.device)))
        for block in self.blocks:
            z = block(z)
        return self.head(self.norm(z))
