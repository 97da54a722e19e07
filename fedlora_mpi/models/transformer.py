"""A Transformer encoder that classifies texts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention, then a feedforward network, each with a residual connection.

    Source: Vaswani et al., NIPS 2017. The norm comes before each of the two, as in Xiong et al.,
    ICML 2020, so that the network trains with plain SGD and without a warm-up.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        feedforward: int,
        dropout: float,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        # With batch_first, evaluation would use torch's fused path, whose last bits differ.
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=False)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return the block's output [B, L, width] for x [B, L, width].

        padding_mask: [B, L], True for places that attention ignores; None: it ignores none. The
        batch axis comes first, so that an example's dropout does not depend on the number of
        examples after it.
        """
        z = self.norm1(x).transpose(0, 1)  # [L, B, width]
        # need_weights selects plain products, which vmap and the FLOP counter support. They do not
        # support torch's fused attention for CPUs.
        y, _ = self.attention(z, z, z, padding_mask, need_weights=True, average_attn_weights=False)
        x = x + self.dropout(y.transpose(0, 1))
        y = self.activation(self.linear1(self.norm2(x)))
        return x + self.dropout(self.linear2(self.dropout(y)))


class Transformer(nn.Module):
    """Embeddings of words plus positions, blocks, a norm, the mean over the words, a Linear.

    ``tokens``: number of token ids, including ``padding``. ``length``: number of tokens of the
    longest text.
    """

    def __init__(
        self,
        classes: int,
        length: int,
        tokens: int,
        padding: int,
        *,
        width: int,
        heads: int,
        layers: int,
        feedforward: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.words = nn.Embedding(tokens, width)
        self.places = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads, feedforward, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        with torch.no_grad():
            for embedding in (self.words, self.places):
                embedding.weight *= 0.02  # N(0, 0.02^2), as Devlin et al., NAACL 2019

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, classes] of token ids x [B, L].

        Padding is ignored except in the first place, so that an empty text has a mean too.
        """
        position = torch.arange(x.shape[1], device=x.device)
        padding_mask = (x == self.padding) & (position > 0)
        z = self.dropout(self.words(x) + self.places(position))  # [B, L, width]
        for block in self.blocks:
            z = block(z, padding_mask)
        is_word = ~padding_mask.unsqueeze(-1)  # [B, L, 1]
        return self.head((self.norm(z) * is_word).sum(1) / is_word.sum(1))
