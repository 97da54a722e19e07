"""Clients with five different networks in stacks, against the same clients trained one by one.

Client samples per second of a pFedLoRA round (training, mean, no evaluation) on one core, by both
paths: small networks on 8x8 images, where a stack wins, and the five CNNs of the pFedLoRA authors
on 32x32 images, where a batch keeps the core busy. Correctness first: both paths end at the same
weights.

    python benchmarks/mixed.py [--repeats 3]
"""

import statistics
import time

from report import arguments, tell

from fedlora_mpi.config import from_dict
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.federation.federation import State
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.mpi.comm import Solo

WORKLOADS = {  # name: (images, networks, train)
    "small networks": (
        {"size": 8, "channels": 1, "train": 2000, "test": 200},
        [{"name": "cnn", "width": width, "hidden": 64} for width in (2, 4, 6, 8, 10)],
        {"epochs": 2, "batch_size": 10, "lr": 0.01},
    ),
    "five CNNs": (
        {"size": 32, "channels": 3, "train": 1000, "test": 200},
        ["cnn1", "cnn2", "cnn3", "cnn4", "cnn5"],
        {"epochs": 1, "batch_size": 64, "lr": 0.01},
    ),
}
CLIENTS = 20


def prepare(images: dict, networks: list, train: dict, path: str):
    """A built run and its first state."""
    each = images["train"] // CLIENTS
    data = {
        "dataset": "synthetic",
        "synthetic": images,
        "partition": {"kind": "iid", "clients": CLIENTS, "train": each, "test": 10},
    }
    tree = {
        "data": data,
        "model": {"mix": networks},
        "algorithm": "pfedlora",
        "train": train,
        "rounds": 1,
    }
    built = build(
        from_dict(tree | {"engine": {"path": path, "group_size": 4}}, "benchmark"),
        "benchmark",
        Solo(),
    )
    return built, initial_state(built)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    asked, rows = parser.parse_args(), []
    for name, (images, networks, train) in WORKLOADS.items():
        speed: dict[str, list[float]] = {"stack": [], "loop": []}
        ends = {}
        for path in speed:
            built, state = prepare(images, networks, train, path)
            for _ in range(asked.repeats + 1):  # the first warms up
                begin = time.perf_counter()
                end, row, _ = run_round(
                    built.federation,
                    State(0, *state[1:3], {n: v.clone() for n, v in state.personal.items()}),
                    False,
                    False,
                )
                speed[path].append(
                    images["train"] * train["epochs"] / (time.perf_counter() - begin)
                )
            ends[path] = end.shared
        wrong = max(
            float((ends["stack"][n] - v).abs().max() / v.abs().max())
            for n, v in ends["loop"].items()
        )
        assert wrong < 1e-3, f"{name}: stack and loop differ by {wrong}"
        ratio = statistics.median(
            a / b for a, b in zip(speed["stack"][1:], speed["loop"][1:], strict=True)
        )
        rows.append(
            {
                "workload": name,
                "clients": CLIENTS,
                "networks": len(networks),
                "group size": 4,
                **{
                    f"{path} samples/s": statistics.median(found[1:])
                    for path, found in speed.items()
                },
                "stack / loop": ratio,
                "difference": wrong,
            }
        )
    tell(asked, rows)


if __name__ == "__main__":
    main()
