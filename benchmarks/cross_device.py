"""Small cohorts of many small clients on one core: one by one, in stacks, and in stacks whose steps are compiled.

    python benchmarks/cross_device.py [--side 28] [--clients 1000] [--cohort 50] [--group 10]

Client samples per second of `play` under FedAvg: clients of 50 images, batch 10, one epoch, the two-convolution CNN; the
better of three rounds after the first, which is given apart, since there the compiler works. Correctness first: all ways
end round 1 at the same weights, within 1e-4. `of peak`: the FLOPs of training over what the core does in the same time in
products of 1024x1024 matrices; what a way can still gain.
"""

import time

import torch
from report import arguments, tell

from fedlora_mpi.build import build
from fedlora_mpi.comm import Solo
from fedlora_mpi.config import from_dict
from fedlora_mpi.round import play
from fedlora_mpi.saving import beginning

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


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--cohort", type=int, default=50)
    parser.add_argument("--group", type=int, default=10)
    asked = parser.parse_args()
    data = {"dataset": "synthetic", "synthetic": {"size": asked.side, "channels": 1, "train": 50 * asked.clients, "test": 2000}}
    data["partition"] = {"kind": "iid", "clients": asked.clients, "train": 50, "test": 2}
    rates, ends, rows, most = {}, {}, [], peak()
    for way, engine in WAYS.items():
        if engine["path"] == "stack":
            engine = engine | {"group_size": asked.group}
        tree = {"data": data, "model": "cnn", "algorithm": "fedavg", "train": {"epochs": 1, "batch_size": 10, "lr": 0.01}}
        tree |= {"engine": engine, "rounds": 1, "participation": asked.cohort / asked.clients}
        built = build(from_dict(tree, "benchmark"), "benchmark", Solo())
        state, seconds = beginning(built), []
        for _ in range(4):
            begin = time.process_time()
            end, _, _ = play(built.run, state, evaluate=False, stop=False)
            seconds.append(time.process_time() - begin)
        ends[way], rates[way] = end.shared, 50 * asked.cohort / min(seconds[1:])
        apart = max(float((v - ends["loop"][n]).abs().max()) for n, v in end.shared.items())
        assert apart < 1e-4, f"{way}: {apart} from the loop"
        flop = built.run.flops[0].of_round(50, 0) / 50
        row = {"way": way, "samples/s": rates[way], "against the loop": rates[way] / rates["loop"]}
        rows.append(row | {"of peak": rates[way] * flop / most, "s of round 1": seconds[0]})
    tell(asked, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
