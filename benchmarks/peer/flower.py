"""FedAvg of Flower's simulation on a workload of ../peers.py, written as its documentation shows.

python flower.py FOLDER --rounds R
"""

import argparse
import itertools
import json
import os
import time
from functools import cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peers import module
from torch.utils.data import DataLoader, Dataset

client_app = ClientApp()


class Samples(Dataset):
    """A client's samples in the order of the workload."""

    def __init__(self, work: dict, client: int) -> None:
        self._x, self._y, self._order = work["x"][client], work["y"][client], work["order"][client]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, at: int):
        return self._x[self._order[at]], self._y[self._order[at]]


@cache
def workload() -> tuple[dict, dict]:
    """Once in a process that trains clients."""
    torch.set_num_threads(1)
    folder = Path(os.environ["WORKLOAD"])
    return json.loads((folder / "spec.json").read_text()), torch.load(folder / "workload.pt")


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    spec, work = workload()
    net = module(spec, message.content["arrays"].to_torch_state_dict()).train()
    optimizer, total = torch.optim.SGD(net.parameters(), lr=spec["lr"]), 0.0
    samples = Samples(work, int(context.node_config["partition-id"]))
    for x, y in DataLoader(samples, batch_size=spec["batch"]):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        total += float(loss) * len(y)
    metrics = MetricRecord({"num-examples": len(samples), "train_loss": total / len(samples)})
    return Message(
        RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    asked = parser.parse_args()
    os.environ["WORKLOAD"] = str(asked.folder)
    spec, work = workload()
    ends, losses, server_app = [], [], ServerApp()

    def ended(number: int, arrays: ArrayRecord) -> MetricRecord:
        ends.append(time.perf_counter())  # also before the first round
        if number == 1:
            torch.save(arrays.to_torch_state_dict(), asked.folder / "end.pt")
        return MetricRecord()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        fraction = spec["cohort"] / spec["clients"]
        strategy = FedAvg(
            fraction_train=fraction, fraction_evaluate=0.0, min_available_nodes=spec["clients"]
        )
        start = ArrayRecord(module(spec, work["start"]).state_dict())
        found = strategy.start(
            grid=grid, initial_arrays=start, num_rounds=asked.rounds, evaluate_fn=ended
        )
        losses.extend(
            float(m["train_loss"]) for _, m in sorted(found.train_metrics_clientapp.items())
        )

    one = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": 1, "include_dashboard": False},
    }
    run_simulation(server_app, client_app, num_supernodes=spec["clients"], backend_config=one)
    seconds = [b - a for a, b in itertools.pairwise(ends)]
    (asked.folder / "result.json").write_text(json.dumps({"seconds": seconds, "loss": losses[0]}))


if __name__ == "__main__":
    from flower import main  # by this name the processes that train import it, each once

    main()
