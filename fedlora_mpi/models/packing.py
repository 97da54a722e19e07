"""Several texts in one input of a language model.

A packed row [L] holds the token ids of one text after another. The first token id of each text is
stored plus V, the number of token ids; so a row itself says where its texts begin. Padding may
follow: it counts as the end of the last text.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.escapes import summarize_error


class PackedTexts(NamedTuple):
    """What a network needs to know of packed rows."""

    ids: Tensor  # [B, L] token ids below V
    positions: Tensor  # [B, L] the position in the text, from 0
    # [B, L, L] whether a position (dimension 1) sees another (dimension 2): one of the same text
    # that does not come later
    visible: Tensor


def unpack(x: Tensor, tokens: int) -> PackedTexts:
    """Return the texts of packed rows x [B, L] of ``tokens`` token ids.

    A row without a mark is one text.
    """
    is_first = x >= tokens
    text = is_first.cumsum(-1)
    visible = (text.unsqueeze(-1) == text.unsqueeze(-2)).tril()
    return PackedTexts(torch.where(is_first, x - tokens, x), visible.sum(-1) - 1, visible)


def check_packing(network: Callable[[Tensor], Tensor], tokens: int, length: int) -> None:
    """Raise ValueError unless ``network`` gives texts in one row the logits that each has alone.

    It maps packed rows [B, length] of ``tokens`` token ids to logits [B, length, tokens].
    """
    if length < 2:  # a row holds a single token
        return
    first = torch.arange(length // 2) % tokens
    second = torch.arange(1, 1 + length - len(first)) % tokens
    first[0] += tokens
    second[0] += tokens
    rows = torch.stack(
        [torch.cat(parts) for parts in ((first, second), (first, 0 * second), (second, 0 * first))]
    )
    advice = "unpack its inputs by fedlora_mpi.models.packing, or set data.language.packing = false"
    try:
        with torch.no_grad():
            together, first_alone, second_alone = network(rows)
    except Exception as error:  # a user's network may raise anything
        raise ValueError(
            f"cannot read several texts in a row ({summarize_error(error)}); {advice}"
        ) from error
    alone = torch.cat([first_alone[: len(first)], second_alone[: len(second)]])
    if not torch.allclose(together, alone, rtol=1e-4, atol=1e-5):
        raise ValueError(f"gives texts in one row other logits than each has alone; {advice}")
