"""A Transformer encoder that classifies texts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention, then a feedforward network, each on the normalised input and added to it (Vaswani
    et al., NIPS 2017, with the norm in front as Xiong et al., ICML 2020: trains by plain SGD,
    without a warm-up).
    """

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        # With batch_first its evaluation would take torch's fused path, whose last bits are others.
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=False)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """x: [B, L, width], for dropout must not depend on how many examples follow; hidden: [B, L]
        True where nobody looks.
        """
        z = self.norm1(x).transpose(0, 1)  # [L, B, width]
        # With the weights it is made of plain products, which vmap batches and the FLOP counter
        # sees; of torch's fused attention for CPUs neither is true.
        y, _ = self.attention(z, z, z, padding_mask, need_weights=True, average_attn_weights=False)
        x = x + self.dropout(y.transpose(0, 1))
        return x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(self.norm2(x))))))


class Transformer(nn.Module):
    """Words and their places, embedded and added; blocks; a norm; the mean over the words; Linear.

    ``tokens``: how many words there are, one of them ``padding``; ``length``: places of the longest
    text.
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
        """x: [B, L] token ids. Padding counts nowhere, but in the first place: an empty text has a
        mean too.
        """
        position = torch.arange(x.shape[1], device=x.device)
        padding_mask = (x == self.padding) & (position > 0)
        z = self.dropout(self.words(x) + self.places(position))  # [B, L, width]
        for block in self.blocks:
            z = block(z, padding_mask)
        is_word = ~padding_mask.unsqueeze(-1)  # [B, L, 1]
        return self.head((self.norm(z) * is_word).sum(1) / is_word.sum(1))
