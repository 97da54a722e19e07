"""Small cohorts of many small clients on one core: one by one, in stacks, and in stacks whose steps
are compiled.

    python benchmarks/cross_device.py [--side 28] [--clients 1000] [--cohort 50] [--group 10]

Client samples per second of `play` under FedAvg: clients of 50 images, batch 10, one epoch, the
two-convolution CNN; the median of so many rounds, in which all ways take turns, after a first that
is given apart, since there the compiler works. Correctness first: all ways end round 1 at the same
weights, within 1e-4. `of peak`: the FLOPs of training over what the core does in the same time in
products of 1024x1024 matrices; what a way can still gain.
"""

import time
from statistics import median

import torch
from report import arguments, tell

from fedlora_mpi.config import from_dict
from fedlora_mpi.engine.flops import Flops
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.mpi.comm import Solo

WAYS = {
    "loop": {"path": "loop"},
    "loop, compiled": {"path": "loop", "compile": True},
    "stack": {"path": "stack"},
    "stack, compiled": {"path": "stack", "compile": True},
}


def peak() -> float:
    """FLOP/s of this core in large products, float32; the best of ten."""
    a, seconds = torch.rand(1024, 1024), []
    for _ in range(10):
        begin = time.process_time()
        a @ a
        seconds.append(time.process_time() - begin)
    return 2 * 1024**3 / min(seconds)


def played(built, state) -> tuple[float, dict]:
    """Seconds of a round, and its weights."""
    begin = time.process_time()
    end, _, _ = run_round(built.federation, state, evaluate=False, stop=False)
    return time.process_time() - begin, end.shared


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--cohort", type=int, default=50)
    parser.add_argument("--group", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    data = {
        "dataset": "synthetic",
        "synthetic": {"size": asked.side, "channels": 1, "train": 50 * asked.clients, "test": 2000},
    }
    data["partition"] = {"kind": "iid", "clients": asked.clients, "train": 50, "test": 2}
    tree = {
        "data": data,
        "model": "cnn",
        "algorithm": "fedavg",
        "train": {"epochs": 1, "batch_size": 10, "lr": 0.01},
    }
    tree |= {"rounds": 1, "participation": asked.cohort / asked.clients}
    ready, first, taken = {}, {}, {way: [] for way in WAYS}
    for way, engine in WAYS.items():
        engine = engine | ({"group_size": asked.group} if engine["path"] == "stack" else {})
        built = build(from_dict(tree | {"engine": engine}, "benchmark"), "benchmark", Solo())
        ready[way] = built, initial_state(built)
        first[way], end = played(*ready[way])
        if way == "loop":
            loop = end
        apart = max(float((v - loop[n]).abs().max()) for n, v in end.items())
        assert apart < 1e-4, f"{way}: {apart} from the loop"
    for _ in range(asked.rounds):
        for way in WAYS:
            taken[way].append(played(*ready[way])[0])
    rows, most = [], peak()
    client_type = built.federation.clients.types[0]
    flops = Flops(client_type.trainer, client_type.local_initial)
    flop = flops.round_flops(50, 0) * asked.cohort
    for way, seconds in taken.items():
        against = median(a / b for a, b in zip(taken["loop"], seconds, strict=True))
        row = {
            "way": way,
            "samples/s": 50 * asked.cohort / median(seconds),
            "against the loop": against,
        }
        rows.append(row | {"of peak": flop / median(seconds) / most, "s of round 1": first[way]})
    tell(asked, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
