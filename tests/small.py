"""What several test files share: ragged clients, tiny networks, one way to play rounds."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import nn

from fedlora_mpi.aggregation.topology import mixing_matrix
from fedlora_mpi.algorithm import LocalTraining
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import tmap
from fedlora_mpi.data.datasets import Data
from fedlora_mpi.data.feed import Feed
from fedlora_mpi.data.inputs import Images
from fedlora_mpi.data.partition import Split
from fedlora_mpi.data.samples import Samples
from fedlora_mpi.engine.train import Trainer
from fedlora_mpi.experiment.assembly import Assembly
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.federation.clients import Clients, ClientType
from fedlora_mpi.federation.cohorts import Cohorts, group_clients
from fedlora_mpi.federation.federation import Federation
from fedlora_mpi.federation.placement import Placement
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.models import zoo
from fedlora_mpi.models.resnet import ResNet
from fedlora_mpi.mpi.comm import Solo

torch.set_num_threads(1)  # the engine's default; sums in another order have other last bits

CPU = torch.device("cpu")
CLASSES, SHAPE = 6, (3, 7, 5)
SIZES = (11, 7, 7, 3, 2)  # in batches of 5: a remainder of one sample, two clients below a batch
TRAIN = LocalTraining(epochs=3, batch_size=5, lr=0.05, momentum=0.9)


def bn_net(classes, shape):
    """A residual network with BatchNorm: a 3x3 stem, widths 3 and 5."""
    return ResNet(classes, shape[0], (3, 5), imagenet_stem=False)


def noisy_net(classes, shape):
    """Two dropout layers of different kinds."""
    wide = 5 * (shape[1] - 2) * (shape[2] - 2)
    return nn.Sequential(
        nn.Conv2d(shape[0], 5, 3),
        nn.Dropout2d(0.3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.4),
        nn.Linear(wide, classes),
    )


def cnn(classes, shape):
    """The package's cnn, made small."""
    return zoo.cnn(classes, shape, width=3, hidden=5)


def linear_net(classes, shape):
    """A head alone."""
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))


def conv_net(classes, shape):
    """A convolution for a head."""
    return nn.Sequential(nn.Conv2d(shape[0], classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def make_model(network="cnn", classes=CLASSES, shape=SHAPE, seed=1):
    """One of the networks above, or any that the zoo knows; the caller's own, also where ranks are
    threads.
    """
    return deepcopy(_cached_model(network, classes, tuple(shape), seed))


@cache
def _cached_model(network, classes, shape, seed):
    name = f"small:{network}" if network in globals() else network
    return zoo.build(name, {}, classes, shape, seed)


def make_feed(sizes=SIZES, tests=(4, 9, 2, 5, 7), seed=1, same_sample=False):
    """The samples of ``len(sizes)`` clients; the clients of a shorter list hold what they hold in a
    longer.
    """
    sample_sets = []
    for number in (60, 50):
        images = torch.randint(
            0, 256, (number, *SHAPE), dtype=torch.uint8, generator=rng(seed, "images", number)
        )
        sample_sets.append(Samples(images, torch.arange(number) * 5 % 7 % CLASSES))
    train = tuple(
        np.full(n, 8) if same_sample else np.arange(n) * 3 + k for k, n in enumerate(sizes)
    )
    test = tuple((np.arange(n) * 2 + k) % 50 for k, n in enumerate(tests[: len(sizes)]))

    def class_counts(samples, index_lists):
        return np.stack([np.bincount(samples.y[rows], minlength=CLASSES) for rows in index_lists])

    split = Split(
        train, test, class_counts(sample_sets[0], train), class_counts(sample_sets[1], test)
    )
    data = Data(*sample_sets, CLASSES, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), ())
    return Feed(data, split, seed=seed, shift="none", device=CPU, augment=False)


class Float64Images(Images):
    """A store whose images come out as float64."""

    def read(self, rows, warps):
        x, y = super().read(rows, warps)
        return x.double(), y


class Float64Trainer(Trainer):
    """Trains in float64, so that two ways to the same numbers agree to the 13th digit or are not
    the same.

    Between rounds the numbers are float32, as ever.
    """

    def train(self, clients, shared, personal_C, round_, evaluate=False):
        in_float64 = (
            tmap(lambda v: v.double() if v.is_floating_point() else v, t)
            for t in (shared, personal_C)
        )
        return super().train(clients, *in_float64, round_, evaluate)


def make_trainer(
    algorithm,
    network="cnn",
    train=TRAIN,
    stacked=False,
    samples=None,
    fine=False,
    transport=None,
):
    """A Trainer on this CPU; ``fine``: in float64. transport: default: that of a client alone."""
    samples = samples or make_feed()
    if fine:
        samples._train = Float64Images(*samples._train)
    return (Float64Trainer if fine else Trainer)(
        transport or algorithm.transport(0, 1), make_model(network), train, samples, CPU, stacked
    )


def initial_variables(local_trainer):
    """The variables of any client before round 1."""
    return local_trainer.algorithm.init(local_trainer.model, rng(1, "init"))


def repeat_rows(tree, count):
    """The rows of ``count`` clients that start equal, [count, ...]."""
    return {n: v.expand(count, *v.shape).clone() for n, v in tree.items()}


def wide_cnn(classes, shape):
    """The package's cnn with more channels and as many features: 5."""
    return zoo.cnn(classes, shape, width=4, hidden=5)


def make_experiment(
    algorithm,
    network="cnn",
    sizes=SIZES,
    participation=1.0,
    group_size=None,
    same_sample=False,
    samples=None,
    topology=None,
    **how,
):
    """(Federation, State before round 1) of a whole federation in this process.

    network: a name, or several; client k has number k mod their number.
    """
    networks = np.atleast_1d(network).tolist()[: len(sizes)]
    samples = samples or make_feed(sizes, same_sample=same_sample)
    transports = [algorithm.transport(client, len(sizes)) for client in range(len(sizes))]
    kinds = [(networks[k % len(networks)], t.method) for k, t in enumerate(transports)]
    first_of_kind = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    trainers = [
        make_trainer(algorithm, kinds[k][0], samples=samples, transport=transports[k], **how)
        for k in first_of_kind
    ]
    initial = algorithm.init(trainers[0].model, rng(1, "init"))
    type_of = tuple(first_of_kind.index(kinds.index(kind)) for kind in kinds)
    types = tuple(
        ClientType(
            trainer,
            initial_variables(trainer)._replace(shared=initial.shared),
            f"kind-{number}/" if len(trainers) > 1 else "",
        )
        for number, trainer in enumerate(trainers)
    )
    weights = tuple(sizes if algorithm.weights == "samples" else [1] * len(sizes))
    groups = group_clients(sizes, group_size or len(sizes), type_of)
    placement = Placement(
        0, groups, (1.0,) * len(groups), (0,) * len(groups), group_size or len(sizes), type_of
    )
    cohorts = Cohorts((Clients(types, type_of, tuple(sizes), weights),), 1, participation)
    matrix = topology and mixing_matrix(topology, len(sizes))
    federation = Federation.build(algorithm, Solo(), cohorts, placement, matrix=matrix)
    return federation, initial_state(Assembly(None, federation, None, None, SHAPE, ""))


def with_trainers(federation, **fields):
    """``federation`` without tasks, with other fields of its trainers."""
    types = tuple(
        replace(t, trainer=replace(t.trainer, **fields)) for t in federation.clients.types
    )
    clients = replace(federation.clients, types=types)
    cohorts = replace(federation.cohorts, tasks=(clients,))
    return replace(federation, clients=clients, cohorts=cohorts)


def run_rounds(federation, state, rounds):
    """The state after ``rounds`` more rounds."""
    for _ in range(rounds):
        state, _, _ = run_round(federation, state, evaluate=False, stop=False)
    return state


@cache
def final_state(algorithm, network="cnn", rounds=2, **how):
    """The state of that ``experiment`` after some rounds. Cached: change nothing in it."""
    return run_rounds(*make_experiment(algorithm, network, **how), rounds)


def clone_tree(tree):
    """The same numbers in other memory."""
    return {n: v.clone() for n, v in tree.items()}


def trees_equal(a, b):
    """Whether two trees have the same names and the same bits."""
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def assert_near(a, b, rtol=1e-5):
    """Every leaf within ``rtol`` of its largest number."""
    assert list(a) == list(b)
    for name in a:
        gap, max_value = (a[name] - b[name]).abs().max(), b[name].abs().max()
        assert gap <= rtol * max(max_value, 1e-3), f"{name}: {gap:.2e} of {max_value:.2e}"
