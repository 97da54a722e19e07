"""The epsilon of the rounds of a run, by Google's dp-accounting (the extra ``privacy``).

Two runs are neighbours if one of them has one client more (``sampling: poisson``), or if one client
is replaced by another (``fixed``). Each round is a Gaussian mechanism on a cohort that no outsider
knows:

    poisson   sampled with probability q; the sum moves by at most S: Renyi DP of the
              Poisson-subsampled Gaussian (Mironov, Talwar and Zhang 2019)
    fixed     n of N without replacement; the sum moves by at most 2 S: the upper bound of Wang,
              Balle and Kasiviswanathan (2019, Theorem 27), which is much looser, or the bound of
              a round with all clients, if this is lower

The Renyi divergences of all rounds add up. In the second case dp-accounting 0.6 takes the noise
multiplier to be the deviation over the sensitivity, though its documentation says the deviation
over S (https://github.com/google/differential-privacy/issues/378). This is why z / 2 is passed
there.
"""

import logging
from functools import lru_cache
from importlib.util import find_spec
from math import inf

import numpy as np

from .settings import Privacy


def check_library(privacy: Privacy) -> None:
    """Raise ValueError if a run needs epsilon but the library is not installed."""
    if privacy.noise_multiplier and find_spec("dp_accounting") is None:
        raise ValueError(
            f"noise_multiplier = {privacy.noise_multiplier}: needs the library dp-accounting to "
            "count epsilon: pip install 'fedlora-mpi[privacy]'"
        )


def epsilon(
    privacy: Privacy, participation: float, cohort: int, clients: int, rounds: int
) -> float:
    """The epsilon of ``rounds`` rounds at ``privacy.delta``; infinite without noise.

    participation: the probability of a client under Poisson sampling. cohort: the clients of a
    round, out of all ``clients``, if this number is fixed.
    """
    if not privacy.noise_multiplier:
        return inf if rounds else 0.0
    from dp_accounting.rdp import compute_epsilon

    sampling = (participation,) if privacy.samples_poisson else (cohort, clients)
    orders, divergences = _round_divergences(privacy.noise_multiplier, sampling)
    return float(compute_epsilon(orders, rounds * divergences, privacy.delta)[0])


@lru_cache(maxsize=8)
def _round_divergences(
    noise_multiplier: float, sampling: tuple[float] | tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The orders and the Renyi divergences of one round.

    sampling: (the probability of a client,) or (the clients of a round, all clients).
    """
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    if len(sampling) == 1:
        relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
        event = dp_accounting.PoissonSampledDpEvent(
            *sampling, dp_accounting.GaussianDpEvent(noise_multiplier)
        )
    else:
        relation, cohort, clients = dp_accounting.NeighboringRelation.REPLACE_ONE, *sampling
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier / 2)
        event = dp_accounting.SampledWithoutReplacementDpEvent(clients, cohort, gaussian)
    absl = logging.getLogger("absl")
    level = absl.level
    # silences warnings of orders whose series does not converge; they are left out, so epsilon
    # stays a bound
    absl.setLevel(logging.ERROR)
    accountant = RdpAccountant(neighboring_relation=relation).compose(event)
    absl.setLevel(level)
    full_cohort = accountant.orders / 2 * ((1 if len(sampling) == 1 else 2) / noise_multiplier) ** 2
    return accountant.orders, np.minimum(accountant.rdp, full_cohort)
