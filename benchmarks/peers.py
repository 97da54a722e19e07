"""How fast are rounds of other libraries, written as their documentation shows, on the same clients
and batches?

    pip install '.[peers]'                       # flwr[simulation] and pfl[pytorch]
    python benchmarks/peers.py [--rounds 3] [--workloads NAME ...] [--peers NAME ...]

FedAvg by this package, Flower (its simulation on ray) and Apple's pfl, each in processes of its own
on one core (the affinity of all of them), one thread; this package with `engine.path: measure`,
which tries loop and stacks at the start, and once more in bfloat16 where the CPU multiplies it.
Client samples per second of training rounds after the first, without evaluation. `reference`: 10
clients of 500 images 32x32x3, the CIFAR ResNet-8 of 78,042 parameters, batch 100, one epoch.
`cross-device`: 50 of 1,000 clients a round, 50 images 28x28, batch 10, one epoch, a network of two
convolutions.

Correctness first: after round 1 all hold the same parameters, within 1e-4 (BatchNorm's running
statistics apart, which pfl does not average), for all get the same batches in the same order: those
of our feed, laid one epoch behind the other. In `cross-device` Flower draws the cohort itself;
there its training loss of round 1 must be ours within 5 %.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from report import add_names, arguments, tell

from fedlora_mpi.config import from_dict
from fedlora_mpi.engine.half import multiplies_bfloat16
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.federation.federation import State
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.models import zoo
from fedlora_mpi.mpi.comm import Solo

HERE = Path(__file__).parent
PEERS = {"flwr": HERE / "peer" / "flower.py", "pfl": HERE / "peer" / "apple.py"}
WORKLOADS = {
    "reference": {
        "model": "cifar_resnet8",
        "shape": [3, 32, 32],
        "clients": 10,
        "cohort": 10,
        "samples": 500,
        "epochs": 1,
        "batch": 100,
        "lr": 0.01,
    },
    "cross-device": {
        "model": "cnn",
        "shape": [1, 28, 28],
        "clients": 1000,
        "cohort": 50,
        "samples": 50,
        "epochs": 1,
        "batch": 10,
        "lr": 0.01,
    },
}
APART = 1e-4  # of parameters, at most
BFLOAT16 = "fedlora_mpi, bf16"  # not held to APART


def prepared(spec: dict, precision: str = "float32"):
    """A built FedAvg run of a workload and its first state."""
    channels, size, _ = spec["shape"]
    images = {
        "size": size,
        "channels": channels,
        "train": spec["clients"] * spec["samples"],
        "test": spec["clients"],
    }
    partition = {"kind": "iid", "clients": spec["clients"], "train": spec["samples"], "test": 1}
    tree = {
        "data": {"dataset": "synthetic", "synthetic": images, "partition": partition},
        "model": spec["model"],
        "algorithm": "fedavg",
        "train": {
            "epochs": spec["epochs"],
            "batch_size": spec["batch"],
            "lr": spec["lr"],
            "momentum": 0.0,
        },
        "participation": spec["cohort"] / spec["clients"],
        "rounds": 1,
        "engine": {"device": "cpu", "path": "measure", "precision": precision},
    }
    built = build(from_dict(tree, "benchmark"), "benchmark", Solo())
    return built, initial_state(built)


def lay_out(spec: dict, folder: Path) -> None:
    """The workload as files that every side reads: images, labels, the order of each client's
    epochs, first weights.
    """
    built, state = prepared(spec)
    feed, clients = built.federation.clients.trainer.feed, range(spec["clients"])
    whole = feed.unshuffled_batch(clients, all_samples=True)  # in order, without augmentation
    order = torch.empty(spec["clients"], spec["epochs"] * spec["samples"], dtype=torch.int64)
    for client in clients:
        place = {int(sample): at for at, sample in enumerate(built.split.train[client])}
        rows = [feed.epoch([client], 0, epoch).rows[0] for epoch in range(spec["epochs"])]
        order[client] = torch.tensor([place[sample] for row in rows for sample in row.tolist()])
    torch.save(
        {"x": whole.x.contiguous(), "y": whole.y, "order": order, "start": state.shared},
        folder / "workload.pt",
    )
    federation = built.federation
    sizes, members = federation.clients.sizes, federation.cohorts.sample(0).members
    cohort = sorted(members, key=lambda c: (-sizes[c], c))
    (folder / "spec.json").write_text(json.dumps(spec | {"first": cohort}))


def module(spec: dict, start: dict) -> torch.nn.Module:
    """The workload's network as an ordinary module."""
    net = getattr(zoo, spec["model"])(10, tuple(spec["shape"]))
    net.load_state_dict(start, strict=False)
    return net


def ours(folder: Path, rounds: int, precision: str) -> None:
    """This package's side."""
    torch.set_num_threads(1)
    built, state = prepared(json.loads((folder / "spec.json").read_text()), precision)
    seconds, losses = [], []
    for number in range(rounds):
        begin = time.perf_counter()
        state, row, _ = run_round(
            built.federation, State(number, *state[1:]), evaluate=False, stop=False
        )
        seconds.append(time.perf_counter() - begin)
        losses.append(row["train_loss"])
        if number == 0:
            torch.save(state.shared, folder / "end.pt")
    (folder / "result.json").write_text(json.dumps({"seconds": seconds, "loss": losses[0]}))


def measured(line: list[str], folder: Path) -> tuple[dict, dict]:
    """What a side says, and its shared weights after round 1; it runs on one core."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(HERE / "peer")]),
    }
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        line,
        env=env,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    if done.returncode:
        raise RuntimeError(f"{line}: {done.stderr[-3000:]}")
    return json.loads((folder / "result.json").read_text()), torch.load(folder / "end.pt")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    add_names(parser, "--workloads", WORKLOADS)
    add_names(parser, "--peers", PEERS, at_least="*")
    parser.add_argument("--ours", type=Path, help="of this script alone: this package's side")
    parser.add_argument("--precision", default="float32", help="of this script alone")
    asked, rows = parser.parse_args(), []
    if asked.ours:
        return ours(asked.ours, asked.rounds, asked.precision)
    for missing in [name for name in asked.peers if not find_spec(name)]:
        parser.error(
            f"{missing} is not installed: pip install '.[peers]', or leave it out by --peers"
        )
    for name in asked.workloads:
        spec = WORKLOADS[name]
        with tempfile.TemporaryDirectory() as temporary:
            folder, speed, end = Path(temporary), {}, {}
            lay_out(spec, folder)
            our_line = [__file__, "--ours", str(folder)]
            lines = {"fedlora_mpi": our_line}
            if multiplies_bfloat16():
                lines[BFLOAT16] = [*our_line, "--precision", "bf16"]
            lines |= {peer: [str(PEERS[peer]), str(folder)] for peer in asked.peers}
            expected = float("nan")  # our training loss; we come first
            parameters = dict(module(spec, {}).named_parameters()).keys()
            for side, line in lines.items():
                told, end[side] = measured(
                    [sys.executable, *line, "--rounds", str(asked.rounds)], folder
                )
                samples = spec["cohort"] * spec["samples"] * spec["epochs"]
                speed[side] = samples / statistics.median(told["seconds"][1:])
                apart = max(
                    float((end[side][n] - end["fedlora_mpi"][n]).abs().max()) for n in parameters
                )
                row = {
                    "workload": name,
                    "library": side,
                    "samples/s": speed[side],
                    "ours / theirs": speed["fedlora_mpi"] / speed[side],
                }
                if side == "flwr" and spec["cohort"] < spec["clients"]:
                    loss = told["loss"] / expected
                    assert abs(loss - 1) < 0.05, f"{name}, {side}: training loss {loss} of ours"
                    row["agreement"] = f"loss {loss:.3f} of ours"
                else:
                    near = apart < APART or side == BFLOAT16
                    assert near, f"{name}, {side}: parameters are {apart} from ours"
                    row["agreement"] = f"{apart:.1e}"
                if side == "fedlora_mpi":
                    expected = told["loss"]
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    tell(asked, rows, asked.peers)


if __name__ == "__main__":
    main()
