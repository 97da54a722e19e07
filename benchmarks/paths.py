"""Where does a stack of clients overtake the loop on a CPU core? Sets `_STACK_BELOW` of engine/device.py.

Client samples per second of a FedAvg round by both paths, for networks of growing cost.

    python benchmarks/paths.py
"""

import time

from throughput import prepare

from fedlora_mpi.federation import State
from fedlora_mpi.round import play

CASES = [(8, 1, 10, width) for width in (8, 16, 32, 64)] + [(8, 1, 50, width) for width in (8, 16, 32)]
CASES += [(28, 1, 10, width) for width in (8, 16, 32)] + [(32, 3, 10, width) for width in (4, 8, 16)]


def speed(path: str, size: int, channels: int, batch: int, width: int) -> tuple[float, float]:
    """(MFLOP of one batch's forward pass, client samples per second)."""
    data = {
        "dataset": "synthetic",
        "synthetic": {"size": size, "channels": channels, "train": 1200, "test": 120},
        "partition": {"kind": "iid", "clients": 12, "train": 100, "test": 10},
    }
    built, state = prepare(data, {"name": "cnn", "width": width}, {"epochs": 2, "batch_size": batch, "lr": 0.01}, path=path)
    best = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        play(built.run, State(0, *state[1:]), evaluate=False, stop=False)
        best = max(best, 12 * 100 * 2 / (time.perf_counter() - begin))
    return built.run.trainer.model.flops * batch / 1e6, best


def main() -> None:
    print(f"{'image':>8} {'batch':>5} {'width':>5} {'MFLOP':>8} {'loop/s':>9} {'stack/s':>9} {'ratio':>6}")
    for size, channels, batch, width in CASES:
        cost, loop = speed("loop", size, channels, batch, width)
        stack = speed("stack", size, channels, batch, width)[1]
        print(f"{size:>5}x{size:<2} {batch:>5} {width:>5} {cost:8.1f} {loop:9.0f} {stack:9.0f} {stack / loop:6.2f}")


if __name__ == "__main__":
    main()
