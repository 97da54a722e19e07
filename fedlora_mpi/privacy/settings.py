"""The ``privacy`` block: what of a client the others may learn."""

from dataclasses import dataclass
from typing import Literal

from ..core.bounds import bounded


@dataclass(frozen=True)
class Privacy:
    """Differential privacy of clients (DP-FedAvg) and secure aggregation; by the defaults there is
    neither.

    McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018,
    https://arxiv.org/abs/1710.06963, Algorithm 1 with flat clipping. u_k is what client k uploads,
    u what an untrained client would, q the ``participation``, N all clients, S ``clip``, z
    ``noise_multiplier``:

        d_k   =  (u_k - u) min(1, S / ||u_k - u||)          ||.|| over all leaves together
        mean  =  u + (sum_k d_k + N(0, (z S)^2 I)) / (q N)

    All clients count equally, whatever the method's ``weights``. The rest of the method takes this
    as the mean. ``absent: stale`` counts u for those outside the cohort: the sum is then divided by
    N.

    clip: S; null: no differential privacy. delta: that of the epsilon in the log. sampling:
    ``poisson``, every client takes part with probability q on its own; ``fixed``, cohorts as
    without privacy, with their number for q N. noise: of the server, on the sum; or of the
    ``clients``, N(0, (z S)^2 / n) from each of a cohort of n before it is summed.

    Protected are the shared variables of all rounds and what follows from them, from who does not
    know the cohorts. What else the log has of clients (number, loss, accuracies, bytes) is the
    experimenter's view, without noise; so is a run's end by uploads that are not finite. Noise
    comes from the run's ``seed``, in floating point: this simulates what privacy costs, and
    protects nobody.

    secure_aggregation: what a client hands over is masked, so that only the sum of a cohort can be
    read (``masks``). neighbours: how many others of the cohort each client shares a mask with;
    null: all.
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
        """Whether updates are clipped and counted."""
        return self.clip is not None

    @property
    def samples_poisson(self) -> bool:
        """Whether each client takes part on its own, so that the size of a cohort is random."""
        return self.is_differential and self.sampling == "poisson"

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise on the sum."""
        return self.noise_multiplier * (self.clip or 0.0)
