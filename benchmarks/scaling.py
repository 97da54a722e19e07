"""How much faster are two workers on two cores than one, with the same bits? Target: 1.85.

    python benchmarks/scaling.py [--rounds 5]

One process that trains all clients against `mpirun -n 3` (a server and two workers), run after run.
Seconds from the end of round 1, where everything warms up, to that of the last but one: training,
message, evaluation, log. `without other programs`: the same of the seconds in which the cores were
not taken away. Correctness first: both end at the same bits.
"""

import json
import tempfile
from pathlib import Path

from predict import DIGITS, images, played
from report import arguments, tell

LOW_RANK = {"name": "fedlora", "lora_epochs": 2, "conv_rank": 0.6, "linear_rank": 0.6}
REFERENCE = {
    "data": images(8, 200),
    "model": "cifar_resnet8",
    "train": {"epochs": 5, "batch_size": 100, "lr": 0.05},
}
SMALL = {"data": DIGITS, "model": "cnn", "train": {"epochs": 5, "batch_size": 10, "lr": 0.02}}
CASES = {  # name: (config, times as many rounds)
    "CIFAR ResNet-8, FedAvg": (REFERENCE | {"algorithm": "fedavg"}, 1),
    "CIFAR ResNet-8, FedLoRA": (REFERENCE | {"algorithm": LOW_RANK}, 1),
    "digits, FedAvg": (SMALL | {"algorithm": "fedavg"}, 5),
    "digits, FedLoRA": (SMALL | {"algorithm": LOW_RANK}, 5),
}


def main() -> None:
    parser = arguments(__doc__, CASES)
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="of the larger network (default 5); 5 times as many of the digits",
    )
    asked, rows = parser.parse_args(), []
    for name in asked.cases:
        tree, times = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "config.yaml"
            # JSON is YAML
            config.write_text(
                json.dumps(tree | {"rounds": times * asked.rounds, "checkpoint": {"every": 1000}})
            )
            one, two = (played(config, Path(folder) / f"run-{ranks}", ranks) for ranks in (1, 3))
        assert one.bits == two.bits, f"{name}: one worker ends at {one.bits}, two at {two.bits}"
        rows.append(
            {
                "workload": name,
                "1 worker s/round": one.wall,
                "2 workers s/round": two.wall,
                "speed-up": one.wall / two.wall,
                "target": 1.85,
                "without other programs": one.alone / two.alone,
                "bits": "equal",
            }
        )
    tell(asked, rows)


if __name__ == "__main__":
    main()
