"""What a user's own module may hold: models and an algorithm that the tests name in configs."""

import os
import time
from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.models.zoo import cnn


def with_norm(classes: int, shape: tuple[int, ...]) -> nn.Module:
    """A convolution, BatchNorm and a head: the smallest network that has leaves of every role."""
    channels, height, width = shape
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(channels, 4, 3, stride=2, padding=1, bias=False),
            norm=nn.BatchNorm2d(4),
            relu=nn.ReLU(),
            flat=nn.Flatten(),
            head=nn.Linear(4 * (height // 2) * (width // 2), classes),
        )
    )


def wide(classes: int, shape: tuple[int, ...], *, hidden: int = 12) -> nn.Module:
    """A convolution and two Linears, the second with the 8 features of ``normed``."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * (height // 2) * (width // 2), hidden),
        nn.ReLU(),
        nn.Linear(hidden, 8),
        nn.ReLU(),
        nn.Linear(8, classes),
    )


def normed(classes: int, shape: tuple[int, ...]) -> nn.Module:
    """A convolution with BatchNorm, 8 features, a head."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * -(-height // 2) * -(-width // 2), 8),
        nn.ReLU(),
        nn.Linear(8, classes),
    )


class Pause(nn.Module):
    """The identity, which takes TEST_PAUSE seconds in training; the environment, so no config changes."""

    def forward(self, x):
        if self.training:
            time.sleep(float(os.environ.get("TEST_PAUSE", "0")))
        return x


def slow(classes: int, shape: tuple[int, ...]) -> nn.Module:
    """The zoo's cnn with a pause."""
    return nn.Sequential(Pause(), cnn(classes, shape, width=4, hidden=8))


@dataclass(frozen=True)
class FailsOnRank2(FedAvg):
    """FedAvg until the first client of rank 2 has trained."""

    def upload(self, start, end):
        from mpi4py import MPI

        if MPI.COMM_WORLD.rank == 2 and end is not start:
            raise KeyError("a mistake in the user's upload")
        return end.shared
