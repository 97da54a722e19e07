"""The ``privacy`` block: what others may learn about a client."""

from dataclasses import dataclass
from typing import Literal

from ..core.bounds import bounded


@dataclass(frozen=True)
class Privacy:
    """Differential privacy of clients (DP-FedAvg) and secure aggregation. By default both are off.

    McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018,
    https://arxiv.org/abs/1710.06963, Algorithm 1 with flat clipping. u_k is the upload of client k,
    u the upload of an untrained client, q the ``participation``, N the number of all clients, S
    ``clip``, z ``noise_multiplier``:

        d_k   =  (u_k - u) min(1, S / ||u_k - u||)          ||.|| over all leaves together
        mean  =  u + (sum_k d_k + N(0, (z S)^2 I)) / (q N)

    All clients count equally, whatever the method's ``weights``. The rest of the method uses this
    as the mean. With ``absent: stale`` each client outside the cohort counts as u, so the sum is
    divided by N.

    clip: S; null: no differential privacy. delta: of the epsilon in the log. sampling: ``poisson``,
    every client participates independently with probability q; ``fixed``, cohorts as without
    privacy, and their size replaces q N. noise: ``server``, which adds the noise to the sum;
    ``clients``, each client of a cohort of n adds N(0, (z S)^2 / n) before the sum.

    The guarantee covers the shared variables of all rounds and everything computed from them,
    against an observer who does not know the cohorts. All other numbers of clients in the log
    (number, loss, accuracies, bytes) are the experimenter's view and have no noise. The same holds
    for the end of a run because of non-finite uploads. The noise comes from the run's ``seed``, in
    floating point. So this simulates the cost of privacy and protects nobody.

    secure_aggregation: each client's message is masked, so that only the sum of a cohort can be
    read (``masks``). neighbours: the number of other clients of the cohort with which each client
    shares a mask; null: all.
    """

    clip: float | None = None
    noise_multiplier: float = 0.0
    delta: float = 1e-5
    sampling: Literal["poisson", "fixed"] = "poisson"
    noise: Literal["server", "clients"] = "server"
    secure_aggregation: bool = False
    neighbours: int | None = None

    def __post_init__(self) -> None:
        bounded(self, noise_multiplier="[0, inf)", delta="(0, 1)")
        if self.clip is None:
            for field in ("noise_multiplier", "delta", "sampling", "noise"):
                if getattr(self, field) != getattr(Privacy, field):
                    raise ValueError(
                        f"{field} = {getattr(self, field)}: needs a clip, the norm of updates at "
                        "most"
                    )
        elif self.clip <= 0:
            raise ValueError(f"clip = {self.clip}: must be a number above 0, or null")
        elif self.noise_std > 1e9:
            raise ValueError(
                f"noise_multiplier = {self.noise_multiplier}: times clip must be at most 1e9"
            )
        if self.neighbours is not None and not self.secure_aggregation:
            raise ValueError(f"neighbours = {self.neighbours}: needs secure_aggregation = true")
        if self.neighbours is not None and (self.neighbours < 2 or self.neighbours % 2):
            raise ValueError(
                f"neighbours = {self.neighbours}: must be an even number of at least 2, or null"
            )

    @property
    def is_differential(self) -> bool:
        """Whether updates are clipped and epsilon is counted."""
        return self.clip is not None

    @property
    def samples_poisson(self) -> bool:
        """Whether each client participates independently; then a cohort's size is random."""
        return self.is_differential and self.sampling == "poisson"

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise on the sum."""
        return self.noise_multiplier * (self.clip or 0.0)
