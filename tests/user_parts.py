"""What a user's own module may hold: models and an algorithm that the tests name in configs."""

import os
import time
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from fedlora_mpi.algorithm import Algorithm, Transport, Upload, Variables
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.doctor.method_check import small_network
from fedlora_mpi.models.zoo import cnn

with_norm = small_network


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
    """The identity, which takes TEST_PAUSE seconds in training; the environment, so no config
    changes.
    """

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

    def upload(self, start, end, round_):
        from mpi4py import MPI

        if MPI.COMM_WORLD.rank == 2 and end is not start:
            raise KeyError("a mistake in the user's upload")
        return super().upload(start, end, round_)


@dataclass(frozen=True)
class Breaks(FedAvg):
    """FedAvg in which one client's upload is never finite."""

    client: int = 2
    breaks: bool = False

    def transport(self, client, clients):
        return Transport(replace(self, breaks=client == self.client))

    def upload(self, start, end, round_):
        broken = self.breaks and end is not start
        return Upload({n: v * float("nan") if broken else v for n, v in end.shared.items()})


@dataclass(frozen=True)
class FrozenLora(Algorithm):
    """Shared low-rank parts of every weight that ``layers`` match, and a head that stays; the rest
    never trains.

    Ranks and scales go from weight to weight 1, 2, 3, 1, ... and 1, 0.5, 1, ...
    """

    layers: tuple[str, ...] = (
        "*.query.weight",
        "*.value.weight",
        "*.q_lin.weight",
        "*.v_lin.weight",
    )
    head: tuple[str, ...] = ("*.classifier.*", "*.pre_classifier.*")
    dense: bool = False  # pretend that the server has changed the frozen weights

    def matching_leaves(self, model):
        return [
            name
            for name in model.leaves
            if any(fnmatchcase(name, pattern) for pattern in self.layers)
        ]

    def init(self, model, rng):
        shared = {}
        for number, name in enumerate(self.matching_leaves(model)):
            out_side, in_side = model.initial[name].shape[0], model.initial[name][0].numel()
            shared[f"{name}.A"] = torch.randn(1 + number % 3, in_side, generator=rng) / in_side**0.5
            shared[f"{name}.B"] = torch.zeros(out_side, 1 + number % 3)
        head = [
            name
            for name in model.leaves
            if any(fnmatchcase(name, pattern) for pattern in self.head)
        ]
        return Variables(shared, {name: model.initial[name] for name in head})

    def lora_factors(self, model, v):
        names = self.matching_leaves(model)
        return {
            n: (v.shared[f"{n}.A"], v.shared[f"{n}.B"], 1 / (1 + i % 2))
            for i, n in enumerate(names)
        }

    def client_model(self, model, v):
        tree = model.initial | v.personal
        return tree | {
            n: tree[n] + (s * b @ a).view(tree[n].shape)
            for n, (a, b, s) in self.lora_factors(model, v).items()
        }

    def adapter(self, model, v):
        if self.dense:
            raise ValueError("the server has changed the frozen weights themselves")
        return self.lora_factors(model, v), v.personal


def small_vit(classes: int, shape: tuple[int, ...]) -> nn.Module:
    """torchvision's Vision Transformer with one block of 12 features, on 4 patches."""
    from fedlora_mpi.core.vision import import_torchvision

    side = shape[1]
    return import_torchvision().models.VisionTransformer(
        side, side // 2, 1, 2, 12, 20, num_classes=classes
    )


def small_resnet(classes: int, shape: tuple[int, ...]) -> nn.Module:
    """torchvision's ResNet with one block a stage."""
    from fedlora_mpi.core.vision import import_torchvision

    models = import_torchvision().models
    return models.ResNet(
        models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=classes, width_per_group=64
    )
