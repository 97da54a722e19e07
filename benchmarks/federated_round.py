"""What does a FedLoRA round cost beside a FedAvg round of as many epochs?

    python benchmarks/federated_round.py [--repeats 3] [--cases NAME ...]

Seconds of `play` without evaluation, both methods in turn on one core, the median of the ratios.
FedLoRA trains its low-rank part in 2 of 5 epochs and the shared weights in 3, FedAvg these in all
5. Targets: 1.15, and 1.5 for ResNet-10 at ratio 0.8. Correctness first: FedLoRA without its
low-rank epochs ends at FedAvg's weights.
"""

import statistics
import time

import torch
from predict import images
from report import arguments, tell

from fedlora_mpi.config import from_dict
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.federation.federation import State
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.mpi.comm import Solo

OFFICIAL = {"rank_rule": "official", "scale": "official"}
CASES = {  # name: (data, model, ranks, target)
    "CIFAR ResNet-8": (
        images(2, 500),
        "cifar_resnet8",
        {"conv_rank": 0.6, "linear_rank": 4} | OFFICIAL,
        1.15,
    ),
    "ResNet-8": (images(2, 500), "resnet8", {"conv_rank": 0.6, "linear_rank": 4} | OFFICIAL, 1.15),
    "ResNet-10, 64x64": (
        images(1, 200, size=64),
        "resnet10",
        {"conv_rank": 0.8, "linear_rank": 4} | OFFICIAL,
        1.5,
    ),
}
EPOCHS, LORA_EPOCHS = 5, 2


def prepared(data: dict, model: str, algorithm: dict):
    """A built run and its first state."""
    tree = {
        "data": data,
        "model": model,
        "algorithm": algorithm,
        "rounds": 1,
        "train": {"epochs": EPOCHS, "batch_size": 100, "lr": 0.02},
    }
    built = build(from_dict(tree, "benchmark"), "benchmark", Solo())
    return built, initial_state(built)


def timed(built, state: State) -> tuple[float, dict]:
    """(seconds, shared variables at the end) of a round."""
    own = {name: value.clone() for name, value in state.personal.items()}
    begin = time.perf_counter()
    end, _, _ = run_round(
        built.federation, State(0, state.server, state.shared, own), evaluate=False, stop=False
    )
    return time.perf_counter() - begin, end.shared


def low_rank(epochs: int, ranks: dict) -> dict:
    """The block of FedLoRA with these epochs and ranks."""
    return {"name": "fedlora", "lora_epochs": epochs} | ranks


def main() -> None:
    parser = arguments(__doc__, CASES)
    parser.add_argument("--repeats", type=int, default=3)
    asked, rows = parser.parse_args(), []
    for name in asked.cases:
        data, model, ranks, target = CASES[name]

        plain, ours, none = (
            prepared(data, model, a)
            for a in ("fedavg", low_rank(LORA_EPOCHS, ranks), low_rank(0, ranks))
        )
        (_, as_is), (_, off) = timed(*plain), timed(*none)
        wrong = max(
            float((as_is[n] - v).abs().max() / v.abs().max().clamp(min=1e-3))
            for n, v in off.items()
        )
        assert wrong < 1e-3, f"{name}: FedLoRA without low-rank epochs is {wrong} from FedAvg"
        timed(*ours)
        taken = [(timed(*ours)[0], timed(*plain)[0]) for _ in range(asked.repeats)]
        rows.append(
            {
                "workload": name,
                "FedLoRA s/round": statistics.median(a for a, _ in taken),
                "FedAvg s/round": statistics.median(b for _, b in taken),
                "ratio": statistics.median(a / b for a, b in taken),
                "target": target,
                "difference": wrong,
            }
        )
    tell(asked, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
