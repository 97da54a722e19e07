"""What the clients of a cohort report before their mean, which its weights depend on."""

from collections.abc import Callable, Mapping, Set

import numpy as np
import torch
from torch import Tensor

from ..algorithm import Reports


def message_nbytes(clients: int, size: int) -> int:
    """The bytes of the message with the reports, of ``size`` numbers each, of so many clients."""
    return 8 * clients * (1 + size)


def gather_reports(
    sum_ranks: Callable[[np.ndarray], None],
    local_reports: Mapping[int, Tensor],
    members: Set[int],
    size: int,
) -> Reports:
    """The reports of the clients in ``members`` that have one, equal on all ranks.

    sum_ranks: adds up an array over all ranks, in place; local_reports: of this rank's clients,
    [``size``] each. The sum is exact, since one rank alone sets a row.
    """
    clients = sorted(members)
    table = np.zeros((len(clients), 1 + size))  # whether there is a report, and the report
    for row, client in enumerate(clients):
        if client in local_reports:
            table[row] = [1.0, *local_reports[client].tolist()]
    sum_ranks(table)
    is_reported = table[:, 0] > 0
    reporting = tuple(c for c, reported in zip(clients, is_reported, strict=True) if reported)
    return Reports(reporting, torch.from_numpy(table[is_reported, 1:]))
