"""Processors that this machine does not have: what their makers say of them, and what of it an
eager step reaches.
"""

from typing import NamedTuple


class Device(NamedTuple):
    """A GPU by its data sheet: dense, no sparsity."""

    float32: float  # FLOP/s
    tf32: float  # FLOP/s of the tensor cores; as float32 where there is none
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes


GPUS = {
    "v100": Device(15.7e12, 15.7e12, 0.90e12, 32e9),  # SXM2
    "t4": Device(8.1e12, 8.1e12, 0.32e12, 16e9),
    "a10": Device(31.2e12, 62.5e12, 0.60e12, 24e9),
    "a100-40": Device(19.5e12, 156e12, 1.56e12, 40e9),  # SXM
    "a100": Device(19.5e12, 156e12, 2.04e12, 80e9),  # SXM
    "l40s": Device(91.6e12, 183e12, 0.86e12, 48e9),
    "rtx4090": Device(82.6e12, 82.6e12, 1.01e12, 24e9),
    "h100": Device(67e12, 494e12, 3.35e12, 80e9),  # SXM
    "h200": Device(67e12, 494e12, 4.80e12, 141e9),  # SXM
}
PEAK_SHARE = 0.35  # of the FLOP/s, by convolutions and products of small networks: assumed
BANDWIDTH_SHARE = 0.6  # of the memory's, by the operations between them: assumed
CONTEXT_BYTES = 0.6e9  # bytes of a GPU that CUDA and its libraries take for each process: assumed
BANDWIDTH = 12.5e9  # bytes/s between nodes, 100 Gbit/s: assumed where --bandwidth does not say
LATENCY = 5e-6  # seconds of a message between nodes: assumed where --latency does not say


def find_device(name: str) -> Device | None:
    """The GPU of that name; None for ``none``.

    Raises ValueError for one that is not known.
    """
    if name == "none":
        return None
    if name not in GPUS:
        raise ValueError(
            f"--gpus = {name}: not known; known are {', '.join(GPUS)}, or none for CPU cores like "
            "these"
        )
    return GPUS[name]
