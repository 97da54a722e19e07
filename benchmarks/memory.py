"""Peak memory of a run with 400 clients of ResNet-8 beside what `plan` says, in separate processes.

    python benchmarks/memory.py [--root DATA] [--clients 400]

One round of a small cohort: what counts is that all personal parts are held, once.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

from report import arguments, tell


def peak(command: list[str]) -> tuple[float, str]:
    """(peak resident MB, standard output) of a command."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{command}: status {status}"
    return usage.ru_maxrss * 1024 / 1e6, text


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--root", help="folder of CIFAR-10; without it the images are synthetic")
    parser.add_argument("--clients", type=int, default=400)
    asked = parser.parse_args()
    data = {
        "dataset": "synthetic",
        "synthetic": {"size": 32, "channels": 3, "train": 50000, "test": 10000},
    }
    if asked.root:
        data = {"dataset": "cifar10", "root": asked.root}
    data["partition"] = {"kind": "dirichlet_client", "alpha": 0.1, "clients": asked.clients}
    with tempfile.TemporaryDirectory() as folder:
        config = os.path.join(folder, "config.yaml")
        tree = {
            "rounds": 1,
            "participation": 8 / asked.clients,
            "output": os.path.join(folder, "run"),
            "data": data,
            "model": "resnet8",
            "train": {"epochs": 2},
            "algorithm": {
                "name": "fedlora",
                "conv_rank": 0.6,
                "linear_rank": 4,
                "rank_rule": "official",
                "scale": "official",
            },
        }
        with open(config, "w") as file:
            json.dump(tree, file)  # JSON is YAML
        program = [sys.executable, "-m", "fedlora_mpi"]
        text = peak([*program, "plan", config])[1]
        number, unit = re.search(r"memory +([\d.e+]+) (\w+)", text).groups()
        planned = float(number) * {"MB": 1, "GB": 1000}[unit]
        measured = peak([*program, "run", config])[0]
    row = {
        "clients": asked.clients,
        "planned MB": planned,
        "measured MB": measured,
        "planned / measured": planned / measured,
    }
    tell(asked, [row])


if __name__ == "__main__":
    main()
