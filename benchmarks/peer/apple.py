"""FedAvg of pfl (pfl-research) on a workload of ../peers.py, written as its documentation shows.

python apple.py FOLDER --rounds R
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peers import module
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel


class Clock(TrainingProcessCallback):
    """When rounds ended, and the weights after the first."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.ends = folder, []

    def on_train_begin(self, *, model):
        self.ends.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.ends.append(time.perf_counter())
        if central_iteration == 0:
            torch.save(model.pytorch_model.state_dict(), self._folder / "end.pt")
        return False, Metrics()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    spec, work = (
        json.loads((asked.folder / "spec.json").read_text()),
        torch.load(asked.folder / "workload.pt"),
    )
    net = module(spec, work["start"])
    net.loss = lambda x, y, eval=False: torch.nn.functional.cross_entropy(net.train()(x), y)
    net.metrics = lambda x, y, eval=False: {
        "loss": Weighted(float(net.loss(x, y)) * len(y), len(y))
    }

    def dataset(client: int) -> PyTorchTensorDataset:
        order = work["order"][client]
        return PyTorchTensorDataset(
            (work["x"][client][order], work["y"][client][order]), user_id=str(client)
        )

    turn = iter(range(10**9))

    def sampler() -> int:  # the cohort of our round 1, then whoever comes next
        number = next(turn)
        return spec["first"][number] if number < len(spec["first"]) else number % spec["clients"]

    data, clock = FederatedDataset(dataset, sampler), Clock(asked.folder)
    model = PyTorchModel(
        net,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(net.parameters(), 1.0),
    )
    settings = NNAlgorithmParams(
        central_num_iterations=asked.rounds,
        evaluation_frequency=10**6,
        train_cohort_size=spec["cohort"],
        val_cohort_size=0,
    )
    local = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=spec["lr"], local_batch_size=spec["batch"]
    )
    FederatedAveraging().run(
        algorithm_params=settings,
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=model,
        model_train_params=local,
        model_eval_params=NNEvalHyperParams(local_batch_size=spec["batch"]),
        callbacks=[clock],
    )
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=True)]
    (asked.folder / "result.json").write_text(
        json.dumps({"seconds": seconds, "loss": float("nan")})
    )


if __name__ == "__main__":
    main()
