"""Where does a stack of clients overtake the loop on a CPU core? Sets `_STACK_BELOW` of
engine/device.py.

Client samples per second of a FedAvg round by both paths, for networks of growing cost. Correctness
first: both end at the same weights.

    python benchmarks/paths.py
"""

import time

from report import arguments, tell
from throughput import prepare

from fedlora_mpi.federation.federation import State
from fedlora_mpi.federation.round import run_round

CASES = [(8, 1, 10, width) for width in (8, 16, 32, 64)] + [
    (8, 1, 50, width) for width in (8, 16, 32)
]
CASES += [(28, 1, 10, width) for width in (8, 16, 32)] + [
    (32, 3, 10, width) for width in (4, 8, 16)
]


def speed(path: str, size: int, channels: int, batch: int, width: int) -> tuple[float, float, dict]:
    """(MFLOP of one batch's forward pass, client samples per second, shared variables after a
    round).
    """
    data = {
        "dataset": "synthetic",
        "synthetic": {"size": size, "channels": channels, "train": 1200, "test": 120},
        "partition": {"kind": "iid", "clients": 12, "train": 100, "test": 10},
    }
    built, state = prepare(
        data,
        {"name": "cnn", "width": width},
        {"epochs": 2, "batch_size": batch, "lr": 0.01},
        path=path,
    )
    best = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        end, _, _ = run_round(built.federation, State(0, *state[1:]), evaluate=False, stop=False)
        best = max(best, 12 * 100 * 2 / (time.perf_counter() - begin))
    return built.federation.clients.trainer.model.flops * batch / 1e6, best, end.shared


def main() -> None:
    asked, rows = arguments(__doc__).parse_args(), []
    for size, channels, batch, width in CASES:
        (cost, loop, one), (_, stack, other) = (
            speed(path, size, channels, batch, width) for path in ("loop", "stack")
        )
        wrong = max(
            float((other[n] - v).abs().max() / v.abs().max().clamp(min=1e-3))
            for n, v in one.items()
        )
        assert wrong < 1e-2, (
            f"{size} x {size}, batch {batch}, width {width}: stack and loop differ by {wrong}"
        )
        rows.append(
            {
                "image": f"{size}x{size}x{channels}",
                "batch": batch,
                "width": width,
                "MFLOP": cost,
                "loop samples/s": loop,
                "stack samples/s": stack,
                "ratio": stack / loop,
                "difference": wrong,
            }
        )
    tell(asked, rows)


if __name__ == "__main__":
    main()
