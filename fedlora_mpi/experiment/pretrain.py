"""Train a network of a config on the pooled data, and write a file for ``model.weights``.

It is a run of one client that holds every training sample: FedAvg with the config's ``train`` and
``data`` blocks, without its partition and shift. A round is one epoch, so that momentum starts
fresh in every epoch. The result is a pure function of the config, whatever its ``engine.path``.
Words get their numbers from the vocabulary of the config's data; a run on the same data (and
``data.text``) assigns the same numbers.
"""

import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..algorithm import Transport, Variables
from ..algorithms.fedavg import FedAvg
from ..config import Config
from ..config.blocks import prefix_errors
from ..config.experiment import ModelBlock, Network
from ..core.escapes import escape_line
from ..core.seeds import rng
from ..core.tree import Tree, numel
from ..core.units import format_seconds
from ..data.datasets import Data
from ..data.feed import Feed
from ..data.partition import Split
from ..engine.device import retain_freed_memory, select_device
from ..engine.rehearsal import rehearse_engine
from ..engine.settings import Engine
from ..engine.train import Trainer
from ..models.weights import pack_safetensors
from ..models.zoo import is_external
from ..mpi.ending import Fault
from ..store.files import write_atomic
from .parts import load_data, load_models, make_samples, tell_hints


def pretrain(
    config: Config,
    source: str,
    ranks: int,
    *,
    to: Path,
    classes: str | None = None,
    epochs: int | None = None,
    network: int = 0,
) -> None:
    """Train network number ``network`` of the config and write its leaves to ``to``.

    The leaves include statistics. classes: only samples of these, such as 0-4 or 0,2,5; the head
    keeps all its outputs; epochs: default ``train.epochs``. Prints a line per epoch. Raises
    ValueError before training for what cannot be done.
    """
    epochs, networks = config.train.epochs if epochs is None else epochs, config.model.mix
    _check_request(networks, network, epochs, ranks, to)
    pack_safetensors({})  # raises ValueError if safetensors is missing
    block = ModelBlock((networks[network],), loss=config.model.loss)
    trainer, tree = _prepare(replace(config, model=block, algorithm=FedAvg()), source, classes)
    if is_external(networks[network].name) or is_external(config.model.loss):
        with prefix_errors(source):
            rehearse_engine(
                Engine(path="loop"),
                config.engine,
                [(networks[network].name, trainer, Variables(tree, {}))],
                method="fedavg",
                loss=config.model.loss,
            )
    _create_folder(to)
    for line in config.resets:
        print(f"hint: {line}", file=sys.stderr, flush=True)
    for epoch, result in enumerate(_train_epochs(trainer, tree, epochs), 1):
        tree, loss, accuracy, test_loss, nan, seconds = result
        if nan:
            warning = (
                f"epoch {epoch}: logits of {nan:.2%} of the test samples are no numbers (nan); "
                "these count as wrong"
            )
            print(f"fedlora-mpi: {warning}", file=sys.stderr, flush=True)
        has_classes = trainer.model.loss.targets == "classes"
        score = f"accuracy {accuracy:.2%}" if has_classes else f"loss {test_loss:.4f}"
        print(
            f"epoch {epoch}/{epochs} · test {score} · train loss {loss:.4f} · "
            f"{format_seconds(seconds)}",
            flush=True,
        )
    tree |= {n: trainer.model.constants[n] for n in trainer.model.frozen_leaves}
    write_atomic(to, pack_safetensors(tree))
    print(
        f"{escape_line(to)}: {escape_line(networks[network].name)}, {numel(tree):,} numbers; a run "
        f"takes it as model.weights={escape_line(to)}",
        flush=True,
    )


def _check_request(
    networks: Sequence[Network], network: int, epochs: int, ranks: int, to: Path
) -> None:
    """Raise ValueError for what the command line asks and ``pretrain`` cannot do."""
    _require(
        ranks == 1,
        f"{ranks} ranks",
        "pretrain takes one; start it without mpirun (engine.threads gives it cores)",
    )
    _require(epochs >= 1, f"--epochs = {epochs}", "must be an integer of at least 1")
    _require(
        0 <= network < len(networks),
        f"--network = {network}",
        f"must be from 0 to {len(networks) - 1}, as in model.mix",
    )
    _require(to.suffix == ".safetensors", f"--to = {to}", "must be a file .safetensors")
    _require(
        not os.path.lexists(to), f"--to = {to}", "the file exists; remove it or choose another"
    )
    for key in ("adapter", "quantization"):
        value = getattr(networks[network], key)
        _require(
            value is None,
            f"model.{key} = {value}",
            f"pretrain trains all weights of the network; set model.{key}=null",
        )


def parse_classes(text: str | None, classes: int) -> list[int]:
    """Return the classes that ``--classes`` names, ascending; None: all. Raises ValueError."""
    if text is None:
        return list(range(classes))
    numbers = set()
    for part in text.split(","):
        ends = part.split("-") if "-" in part else [part, part]
        is_valid = len(ends) == 2 and all(end.strip().isdecimal() for end in ends)
        first, last = map(int, ends) if is_valid else (1, 0)
        _require(
            first <= last < classes,
            f"--classes = {text}",
            f"must be such as 0-4 or 0,2,5, from 0 to {classes - 1}",
        )
        numbers |= set(range(first, last + 1))
    return sorted(numbers)


def pool_samples(data: Data, classes: Collection[int]) -> Split:
    """Return a split in which one client has all training and test samples of these classes."""
    rows, class_counts = [], []
    for name, y in zip(("training", "test"), data.class_labels, strict=True):
        rows.append((np.flatnonzero(np.isin(y, list(classes))),))
        class_counts.append(np.bincount(y[rows[-1][0]], minlength=data.label_classes)[None])
        _require(
            len(rows[-1][0]) > 0,
            f"--classes = {','.join(map(str, classes))}",
            f"there is no {name} sample of these",
        )
    (train, test), (train_counts, test_counts) = rows, class_counts
    return Split(train, test, train_counts, test_counts)


def _prepare(config: Config, source: str, classes: str | None) -> tuple[Trainer, Tree]:
    """Return the trainer and the variables before the first epoch."""
    retain_freed_memory()
    device = select_device(config.engine, 0)
    data = load_data(config, source)
    tell_hints(data, source)
    (model,) = load_models(config, source, data)
    name, is_frozen = config.model.mix[0].name, all(model.role(n) == "stats" for n in model.leaves)
    _require(
        not is_frozen,
        f"model.name = {name}",
        "all its parameters are frozen (requires_grad is False); leave some to be trained",
    )
    split = pool_samples(data, parse_classes(classes, data.label_classes))
    samples, sample_split = make_samples(config, data, split)
    feed = Feed(samples, sample_split, seed=config.seed, shift="none", device=device, augment=True)
    settings = replace(config.train, epochs=1)
    trainer = Trainer(
        Transport(config.algorithm), model.to(device), settings, feed, device, stacked=False
    )
    return trainer, config.algorithm.init(model, rng(config.seed, "init")).shared


def _train_epochs(
    trainer: Trainer, tree: Tree, epochs: int
) -> Iterator[tuple[Tree, float, float, float, float, float]]:
    """Yield (leaves, training loss, test accuracy, test loss, NaN predictions, seconds) of every
    epoch.

    Accuracy and NaN predictions are fractions; the latter are test samples with NaN for a logit.
    Raises Fault.
    """
    for epoch in range(epochs):
        start_time = time.perf_counter()
        (result,) = trainer.train([0], tree, {}, epoch, evaluate=True)
        assert result.score is not None  # evaluated
        tree = result.end.shared
        if not all(torch.isfinite(v).all() for v in (result.loss, *tree.values())):
            raise Fault(
                f"epoch {epoch + 1}: the loss or a weight is not finite; nothing was written. "
                "Lower train.lr"
            )
        yield (
            tree,
            float(result.loss),
            *result.score.tolist(),
            time.perf_counter() - start_time,
        )


def _create_folder(target: Path) -> None:
    """Create the folder of the result, before hours of training."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--to = {target}: {target.parent} cannot be created: {error.strerror}; choose another"
        ) from error
    _require(
        os.access(target.parent, os.W_OK),
        f"--to = {target}",
        f"{target.parent} cannot be written to; choose another",
    )


def _require(is_valid: bool, setting: str, reason: str) -> None:
    """Raise ValueError about a ``setting`` of the command line unless it ``is_valid``."""
    if not is_valid:
        raise ValueError(f"{setting}: {reason}")
