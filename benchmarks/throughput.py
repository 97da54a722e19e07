"""Whole rounds against a bare PyTorch loop of the same network, on one core, in one run.

Client samples per second of `play` (training, mean, evaluation, all of a round) under FedAvg, over
those of a loop over nn.Modules in channels_last with torch.optim.SGD, which does no round at all.
Then the same rounds with `engine.precision: bf16`, where this CPU multiplies bfloat16.
Correctness first: one client's round must end at the loop's weights. Of a round in bfloat16, the
script says how far from them it ends.

    python benchmarks/throughput.py [--repeats 3]
"""

import statistics
import time

import torch
from report import arguments, tell
from torch import nn

from fedlora_mpi.config import from_dict
from fedlora_mpi.engine.half import multiplies_bfloat16
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.federation.federation import State
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.mpi.comm import Solo

WORKLOADS = {  # name: (data, model, train, group size, target ratio)
    "cifar_resnet8": (
        {
            "dataset": "synthetic",
            "synthetic": {"size": 32, "channels": 3, "train": 2000, "test": 200},
            "partition": {"kind": "iid", "clients": 2, "train": 500, "test": 20},
        },
        "cifar_resnet8",
        {"epochs": 5, "batch_size": 100, "lr": 0.01},
        "auto",
        0.95,
    ),
    "digits": (
        {
            "dataset": "digits",
            "partition": {"kind": "iid", "clients": 10, "train": 140, "test": 30},
        },
        "cnn",
        {"epochs": 5, "batch_size": 10, "lr": 0.05},
        10,
        2.0,
    ),
}


def prepare(data: dict, model: str | dict, train: dict, **engine):
    """A built FedAvg run and its first state."""
    tree = {
        "data": data,
        "model": model,
        "algorithm": "fedavg",
        "train": train,
        "engine": engine,
        "rounds": 1,
    }
    built = build(from_dict(tree, "benchmark"), "benchmark", Solo())
    return built, initial_state(built)


def bare_loop(built, clients: list[int]) -> tuple[float, nn.Module]:
    """Seconds to train ``clients`` one after another as one would by hand;
    the last one's module."""
    (client_type,), settings = built.federation.clients.types, built.config.train
    trainer, first = client_type.trainer, client_type.initial
    feed = trainer.feed
    begin = time.perf_counter()
    for client in clients:
        module = trainer.model.to_module(first.shared).train()
        module = module.to(trainer.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(module.parameters(), settings.lr, settings.momentum)
        size = feed.train_size(client)
        for epoch in range(settings.epochs):
            batches = feed.epoch([client], 0, epoch)
            for at in range(0, size, settings.batch_size):
                batch = batches.batch(1, at, min(settings.batch_size, size - at))
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(module(batch.x[0]), batch.y[0])
                loss.backward()
                optimizer.step()
    return time.perf_counter() - begin, module


def check(built) -> float:
    """Largest relative difference between one client trained by the engine and by the loop."""
    clients = built.federation.clients
    _, module = bare_loop(built, [0])
    (done,) = clients.trainer.train([0], clients.types[0].initial.shared, {}, 0)
    theirs = module.state_dict()
    return max(
        float((value - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-3))
        for name, value in done.end.shared.items()
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    asked, rows = parser.parse_args(), []
    for name, (data, model, train, group_size, target) in WORKLOADS.items():
        runs = {"float32": prepare(data, model, train, group_size=group_size)}
        if multiplies_bfloat16():
            runs["bf16"] = prepare(data, model, train, group_size=group_size, precision="bf16")
        wrong = {precision: check(built) for precision, (built, _) in runs.items()}
        assert wrong["float32"] < 1e-3, f"{name}: engine and loop differ by {wrong['float32']}"
        built = runs["float32"][0]
        clients = list(range(len(built.federation.clients)))
        samples = (
            sum(built.federation.clients.trainer.feed.train_size(c) for c in clients)
            * built.config.train.epochs
        )
        ours: dict[str, list[float]] = {precision: [] for precision in runs}
        theirs = []
        for _ in range(asked.repeats + 1):  # the first warms up
            for precision, (run, state) in runs.items():
                begin = time.perf_counter()
                run_round(run.federation, State(0, *state[1:]), evaluate=True, stop=False)
                ours[precision].append(samples / (time.perf_counter() - begin))
            theirs.append(samples / bare_loop(built, clients)[0])

        def ratio(a: list[float], b: list[float]) -> float:
            return statistics.median(x / y for x, y in zip(a[1:], b[1:], strict=True))

        for precision, speeds in ours.items():
            rows.append(
                {
                    "workload": name,
                    "path": built.config.engine.path,
                    "group size": built.config.engine.group_size,
                    "precision": precision,
                    "rounds samples/s": statistics.median(speeds[1:]),
                    "bare loop samples/s": statistics.median(theirs[1:]),
                    "ratio": ratio(speeds, theirs),
                    "target": target if precision == "float32" else None,
                    "against float32": ratio(speeds, ours["float32"]),
                    "difference": wrong[precision],
                }
            )
    tell(asked, rows)


if __name__ == "__main__":
    main()
