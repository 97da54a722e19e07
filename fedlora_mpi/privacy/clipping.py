"""Updates of a bounded norm, and the noise on their sum."""

import torch
from torch import Tensor

from ..core.seeds import rng
from .settings import Privacy


def clip_update(upload: Tensor, reference: Tensor, clip: float) -> Tensor:
    """The difference of an upload [D] from that of an untrained client [D], clipped, in float64.

    If its L2 norm exceeds ``clip``, it is scaled down to this norm.
    """
    update = upload.double() - reference
    norm = torch.linalg.vector_norm(update)
    return update * (clip / norm) if norm > clip else update


def gaussian_noise(size: int, deviation: float, *address: int) -> Tensor:
    """Gaussian noise [size] with this standard deviation, float64.

    address: the seed, the round, and for a client's noise the client.
    """
    stream = rng(address[0], "privacy", *address[1:])
    return torch.randn(size, generator=stream, dtype=torch.float64) * deviation


def contribution(
    privacy: Privacy,
    reference: Tensor,
    cohort: int,
    seed: int,
    round_: int,
    upload: Tensor,
    client: int,
) -> Tensor:
    """What one client of a cohort of ``cohort`` clients adds to the sum, [D].

    This is its clipped update. If the clients add the noise, it includes the client's share.
    Without differential privacy it is the upload. ``reference``: see ``clip_update``.
    """
    if not privacy.is_differential:
        return upload
    assert privacy.clip is not None
    update = clip_update(upload, reference, privacy.clip)
    if privacy.noise == "server":
        return update
    return update + gaussian_noise(
        len(update), privacy.noise_std / cohort**0.5, seed, round_, client
    ).to(update.device)


def server_noise(privacy: Privacy, size: int, cohort: int, *address: int) -> Tensor:
    """The noise [size] that the server adds, the same on every rank; address: seed, round.

    If the cohort is empty, the server adds all the noise, so that an empty cohort does not show.
    """
    adds_noise = privacy.noise == "server" or not cohort
    return gaussian_noise(size, privacy.noise_std if adds_noise else 0.0, *address)
