"""What do clients cost that are not there? Rounds of the same cohort among 1,000, 10,000 and
100,000 clients.

    python benchmarks/absent.py [--clients 1000 10000 100000] [--cohort 100] [--rounds 8]

FedLoRA, 10 images of 8x8 pixels each, one process, personal parts on disk (``engine.personal:
disk``), the cohort alone is evaluated. Seconds of a round are the median without the first; `peak`
is the most memory that the process had. Correctness first: with the fewest clients, parts on disk
and in memory end at the same bits.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

from memory import peak
from report import arguments, tell

from fedlora_mpi.store.reader import RunFiles


def ran(
    folder: Path, clients: int, cohort: int, rounds: int, personal: str
) -> tuple[RunFiles, float]:
    """A finished run, and the peak of its resident memory in MB."""
    tree = {
        "rounds": rounds,
        "participation": cohort / clients,
        "output": str(folder / "run"),
        "data": {
            "dataset": "synthetic",
            "synthetic": {"size": 8, "channels": 1, "train": 10 * clients, "test": 2 * clients},
            "partition": {"kind": "iid", "clients": clients, "train": 10, "test": 2},
        },
        "model": {"name": "cnn", "width": 8, "hidden": 32},
        "algorithm": {"name": "fedlora", "lora_epochs": 1},
        "train": {"epochs": 2, "batch_size": 10, "lr": 0.02},
        "evaluate": {"clients": "cohort"},
        "checkpoint": {"every": rounds},
        "engine": {"personal": personal},
    }
    config = folder / "config.yaml"
    config.write_text(json.dumps(tree))  # JSON is YAML
    most, _ = peak([sys.executable, "-m", "fedlora_mpi", "run", str(config)])
    return RunFiles(folder / "run"), most


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1000, 10000, 100000])
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=8)
    asked = parser.parse_args()
    bits = []
    for personal in ("memory", "disk"):
        with tempfile.TemporaryDirectory() as folder:
            bits.append(
                ran(Path(folder), min(asked.clients), asked.cohort, 2, personal)[0].digest()
            )
    assert bits[0] == bits[1], "other bits in memory than on disk"
    rows = []
    for clients in asked.clients:
        with tempfile.TemporaryDirectory() as folder:
            files, most = ran(Path(folder), clients, asked.cohort, asked.rounds, "disk")
            seconds = files.rounds()
            own = {
                stage: median(seconds[f"seconds_{stage}"][1:])
                for stage in ("train", "exchange", "evaluate")
            }
        row = {"clients": clients, "cohort": asked.cohort} | {
            f"{stage} s": taken for stage, taken in own.items()
        }
        rows.append(row | {"peak MB": most})
        print(rows[-1], file=sys.stderr, flush=True)
    tell(asked, rows)


if __name__ == "__main__":
    main()
