"""How long does the report of a folder of runs take, and how large is its page?

    python benchmarks/pages.py [--rounds 300] [--clients 40] [--runs FOLDER]

Three seeds of the eleven methods of FedLoRA's Table 1, real runs of small clients (20 images of 8x8
pixels each), then ``fedlora-mpi report`` of them in a process of its own. First: the report's table
has a line for every run.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from report import arguments, tell

from fedlora_mpi.store.reader import RunFiles

METHODS = {
    name: {}
    for name in (
        "fedavg",
        "local",
        "fedamp",
        "fedbn",
        "fedper",
        "fedrod",
        "pfedsd",
        "pfedgate",
        "fedcac",
    )
}
METHODS |= {"fedlora": {"lora_epochs": 1}, "fedrep": {"head_epochs": 1}}
PROGRAM = (sys.executable, "-m", "fedlora_mpi")


def make(folder: Path, method: str, seed: int, rounds: int, clients: int) -> Path:
    """A finished run."""
    run = folder / f"{method}-{seed}"
    tree = {
        "seed": seed,
        "rounds": rounds,
        "output": str(run),
        "checkpoint": {"every": rounds},
        "data": {
            "dataset": "synthetic",
            "synthetic": {"size": 8, "channels": 1, "train": 2000, "test": 1000},
            "partition": {
                "kind": "dirichlet_client",
                "alpha": 0.3,
                "clients": clients,
                "train": 20,
                "test": 10,
                "seed": seed,
            },
        },
        "model": {"name": "cnn", "width": 4, "hidden": 16},
        "algorithm": {"name": method} | METHODS[method],
        "train": {"epochs": 2, "batch_size": 10, "lr": 0.02},
    }
    config = folder / f"{method}-{seed}.yaml"
    if (run / "log.h5").is_file() and len(RunFiles(run).rounds()["round"]) == rounds:
        return run
    config.write_text(json.dumps(tree))  # JSON is YAML
    subprocess.run(
        [*PROGRAM, "run", "--resume", str(config)],
        check=True,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    return run


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="FOLDER",
        help="keep the runs there; those it has are not made again",
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.runs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [
            (folder, method, seed, asked.rounds, asked.clients)
            for method in METHODS
            for seed in (1, 2, 3)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            runs = list(pool.map(lambda job: make(*job), jobs))
        began = time.perf_counter()
        page = Path(scratch, "page")
        subprocess.run(
            [*PROGRAM, "report", *map(str, runs), "-o", str(page)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - began
        with (page / "tables" / "runs.csv").open(newline="") as table:
            assert sorted(row["path"] for row in csv.DictReader(table)) == sorted(
                str(run.resolve()) for run in runs
            )
        size = (page / "report.html").stat().st_size
        figures, tables = (
            len(list((page / kind).glob(end)))
            for kind, end in (("figures", "*.png"), ("tables", "*.csv"))
        )
    row = {
        "runs": len(runs),
        "rounds": asked.rounds,
        "clients": asked.clients,
        "seconds": seconds,
        "page MB": size / 1e6,
    }
    tell(asked, [row | {"figures": figures, "tables": tables}])


if __name__ == "__main__":
    main()
