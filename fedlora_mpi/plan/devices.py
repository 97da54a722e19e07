"""Data sheets of GPUs that this machine does not have, and the share of them that training
reaches.
"""

from typing import NamedTuple


class Device(NamedTuple):
    """A GPU by its data sheet; FLOP/s are dense, without sparsity."""

    float32: float  # FLOP/s
    tf32: float  # FLOP/s of the tensor cores; the float32 value for a GPU without tf32
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
# assumed share of the FLOP/s that convolutions and matrix products of small networks reach
PEAK_SHARE = 0.35
# assumed share of the memory bandwidth that all other operations reach
BANDWIDTH_SHARE = 0.6
CONTEXT_BYTES = 0.6e9  # assumed GPU memory of CUDA and its libraries per process
BANDWIDTH = 12.5e9  # assumed bytes/s between nodes (100 Gbit/s) without --bandwidth
LATENCY = 5e-6  # assumed seconds of a message between nodes without --latency


def find_device(name: str) -> Device | None:
    """Return the GPU of that name; None for ``none``.

    Raises ValueError for an unknown name.
    """
    if name == "none":
        return None
    if name not in GPUS:
        raise ValueError(
            f"--gpus = {name}: not known; known are {', '.join(GPUS)}, or none for CPU cores like "
            "these"
        )
    return GPUS[name]
