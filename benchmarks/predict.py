"""Does `fedlora-mpi plan` predict the seconds of a round? Its prediction beside rounds that are
then played.

    python benchmarks/predict.py [--root DATA] [--cases NAME ...] [--ranks 1 3] [--times 3]

Different workloads on 1 rank and on 3 (a server and two workers). Seconds of a round, log and
checkpoints included, without the first, where everything warms up, and the last. `alone`: without
the time that its cores gave to other programs, which is what a plan predicts; on a quiet machine it
is `wall`. Plan and run so many `--times` in turn, as a virtual machine's speed moves; medians, and
the least and the most of `planned / alone`. Correctness first: all numbers of ranks end at the same
bits.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from report import MPIRUN, arguments, tell

from fedlora_mpi.config import read
from fedlora_mpi.plan import estimate
from fedlora_mpi.store.reader import RunFiles


def images(clients: int, train: int, test: int = 20, size: int = 32, channels: int = 3) -> dict:
    """Synthetic images, equally many for each client."""
    return {
        "dataset": "synthetic",
        "synthetic": {
            "size": size,
            "channels": channels,
            "train": clients * train,
            "test": clients * test,
        },
        "partition": {"kind": "iid", "clients": clients, "train": train, "test": test},
    }


DIGITS = {"dataset": "digits", "partition": {"kind": "iid", "clients": 12, "train": 60, "test": 25}}
TEXTS = {"dataset": "ag_news", "text": {"vocabulary": 20000, "length": 64}}
CASES = {  # name: (config, rounds)
    "digits, stack": (
        {
            "data": DIGITS,
            "model": "cnn",
            "algorithm": "fedavg",
            "train": {"epochs": 5, "batch_size": 10, "lr": 0.02},
        },
        13,
    ),
    "digits, FedLoRA": (
        {
            "data": DIGITS,
            "model": "cnn",
            "algorithm": "fedlora",
            "train": {"epochs": 5, "batch_size": 10, "lr": 0.02},
        },
        13,
    ),
    "CIFAR ResNet-8, loop": (
        {
            "data": images(8, 200),
            "model": "cifar_resnet8",
            "algorithm": "fedavg",
            "train": {"epochs": 2, "batch_size": 100, "lr": 0.05},
        },
        5,
    ),
    "ResNet-8, FedLoRA": (
        {
            "data": images(6, 150, 50),
            "model": "resnet8",
            "train": {"epochs": 3, "batch_size": 50, "lr": 0.05},
            "algorithm": {
                "name": "fedlora",
                "lora_epochs": 1,
                "conv_rank": 0.6,
                "linear_rank": 4,
                "rank_rule": "official",
                "scale": "official",
            },
        },
        5,
    ),
    "five CNNs, pFedLoRA": (
        {
            "data": images(10, 64),
            "model": {"mix": ["cnn1", "cnn2", "cnn3", "cnn4", "cnn5"]},
            "algorithm": "pfedlora",
            "train": {"epochs": 1, "batch_size": 32, "lr": 0.01},
        },
        5,
    ),
    "10 of 100 clients": (
        {
            "data": images(100, 50, 4, 28, 1),
            "model": "cnn",
            "algorithm": "fedavg",
            "participation": 0.1,
            "train": {"epochs": 2, "batch_size": 10, "lr": 0.02},
        },
        9,
    ),
    "Dirichlet sizes, SCAFFOLD": (
        {
            "data": images(16, 60, 10, 8, 1)
            | {"partition": {"kind": "dirichlet_class", "alpha": 0.5, "clients": 16, "minimum": 5}},
            "model": {"name": "cnn", "width": 16},
            "algorithm": "scaffold",
            "train": {"epochs": 5, "batch_size": 10, "lr": 0.02, "momentum": 0.0},
        },
        13,
    ),
    "texts, Transformer": (
        {
            "data": TEXTS | {"partition": {"kind": "iid", "clients": 6, "train": 200, "test": 50}},
            "model": {
                "name": "transformer",
                "width": 64,
                "heads": 4,
                "layers": 2,
                "feedforward": 128,
            },
            "algorithm": "fedlora",
            "train": {"epochs": 2, "batch_size": 50, "lr": 0.02},
        },
        5,
    ),
    "ranks of their own, FedHL": (
        {
            "data": images(10, 60),
            "model": "resnet8",
            "train": {"epochs": 1, "batch_size": 20, "lr": 0.02},
            "algorithm": {
                "name": "fedhl",
                "lora_ranks": [64, 32, 16, 16, 8, 8, 4, 4, 4, 4],
                "scale": "common",
                "alpha": 64.0,
            },
        },
        5,
    ),
    "mixes, FedAMP": (
        {
            "data": images(12, 50, 20),
            "model": "cnn",
            "algorithm": "fedamp",
            "train": {"epochs": 1, "batch_size": 25, "lr": 0.02},
        },
        5,
    ),
}


def foretold(config: Path, ranks: int) -> float:
    """Seconds of a round by ``plan``, in a process of its own, as the command would be."""
    line = [sys.executable, __file__, "--foretell", str(config), str(ranks)]
    return float(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout)


class Played(NamedTuple):
    """A run."""

    wall: float  # seconds of a round
    alone: float  # the same without those that its cores gave to other programs
    bits: str  # SHA-256 of the shared variables


def played(config: Path, output: Path, ranks: int) -> Played:
    """A run in processes of its own, from the end of its first round to the end of its last."""
    launch = [MPIRUN[0], "-n", str(ranks), *MPIRUN[1:]] if ranks > 1 else []
    env = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
    }
    line = [*launch, sys.executable, __file__, "--play", str(config), str(output)]
    told = subprocess.run(line, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    took = json.loads(next(line for line in told.splitlines() if line.startswith("[")))
    return Played(*took, RunFiles(output).checkpoint().digest()["shared"])


def play(config: str, output: str) -> None:
    """A run of this process or rank; rank 0 prints the two numbers of ``Played``.

    Alone, a round would take what the rank that computes longest computes, and the log and
    checkpoint behind it.
    """
    from fedlora_mpi.experiment import loop as run
    from fedlora_mpi.mpi.comm import connect

    comm, whole, walls, cpus, ends = connect(), run.run_round, [], [], []

    def clocked(*given, **named):
        wall, cpu = time.perf_counter(), time.process_time()
        row = whole(*given, **named)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        ends.append(wall)  # of the round before, its files included
        return row

    run.run_round = clocked
    run.start(run.receive_config(comm, lambda: read(config, [f"output={output}"])), config, comm)
    table = np.zeros((comm.size, len(cpus)))
    table[comm.rank] = cpus
    comm.sum(table)
    rounds = np.diff([*ends, time.perf_counter()])[1:-1]  # the last writes a checkpoint in any case
    alone = table.max(0)[1:-1] + np.maximum(rounds - walls[1:-1], 0)
    if comm.rank == 0:
        print(json.dumps([rounds.mean(), alone.mean()]))
        stages = RunFiles(output).rounds()
        print(
            {
                n: float(stages[f"seconds_{n}"][1:].mean())
                for n in ("train", "exchange", "evaluate")
            },
            file=sys.stderr,
        )


def main() -> None:
    parser = arguments(__doc__, CASES)
    parser.add_argument(
        "--root", default="~/data", help="folder of AG_NEWS, for the texts (default ~/data)"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument(
        "--play", nargs=2, help="of this script alone: a run whose rounds are timed"
    )
    parser.add_argument(
        "--foretell", nargs=2, help="of this script alone: the seconds that plan expects"
    )
    asked = parser.parse_args()
    if asked.foretell:
        config, ranks = asked.foretell
        found = estimate(read(config, []), config, int(ranks))
        print(f"{found.seconds}", file=sys.stderr)
        return print(found.seconds.round)
    if asked.play:
        return play(*asked.play)
    rows = []
    for name in asked.cases:
        tree, rounds = CASES[name]
        shared = set()
        for ranks in asked.ranks:
            both = []
            for _ in range(asked.times):
                with tempfile.TemporaryDirectory() as folder:
                    config = Path(folder) / "config.yaml"
                    data = {"root": asked.root} | tree["data"]
                    more = {"rounds": rounds, "output": f"{folder}/run", "checkpoint": {"every": 2}}
                    config.write_text(json.dumps(tree | more | {"data": data}))  # JSON is YAML
                    planned = foretold(config, ranks)
                    run = played(config, Path(folder) / "run", ranks)
                both.append((planned, run.wall, run.alone))
                shared.add(run.bits)
            planned, wall, alone = map(median, zip(*both, strict=True))
            ratios = sorted(one / other for one, _, other in both)
            row = {
                "workload": name,
                "ranks": ranks,
                "planned s": planned,
                "wall s": wall,
                "alone s": alone,
            }
            rows.append(
                row | {"planned / alone": planned / alone, "least": ratios[0], "most": ratios[-1]}
            )
            print(rows[-1], file=sys.stderr, flush=True)
        assert len(shared) == 1, f"{name}: other bits on other numbers of ranks"
    tell(asked, rows)


if __name__ == "__main__":
    main()
