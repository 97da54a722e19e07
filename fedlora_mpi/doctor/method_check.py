"""``fedlora-mpi check MODULE:CLASS``: whether a user's method keeps the contract, a line a check.

The checks are the essence of ``tests/test_conformance.py``. They run in this process on tiny
synthetic data, in a temporary folder.
"""

import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property, partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torch import nn

from .. import config as configs
from ..algorithm import misspelt_hooks
from ..algorithms import algorithm_names, find_algorithm
from ..config import Config
from ..config.blocks import prefix_errors, suggest
from ..core.escapes import escape_line
from ..engine.method_guard import describe_failure
from ..engine.rehearsal import find_objection
from ..experiment.assembly import build
from ..experiment.loop import resume, start
from ..experiment.method_trial import CHECKS, MethodTrial, try_method
from ..experiment.parts import load_data, load_models
from ..federation.clients import ClientType
from ..models.network import Model
from ..mpi.comm import Solo
from ..mpi.ending import CollectiveExit
from ..store.reader import RunFiles

_SOURCE = "command line"
_EXPERIMENT = """# A second on one core: 5 clients, of which 3 take part, and leaves of every role.
seed: 1
rounds: 3
participation: 0.6
data:
  dataset: synthetic
  synthetic: {classes: 4, train: 60, test: 20, noise: 1.0}
  partition: {kind: dirichlet_class, alpha: 1.0, clients: 5, minimum: 3}
model: "fedlora_mpi.doctor.method_check:small_network"
train: {epochs: 1, batch_size: 8, lr: 0.05}
engine: {device: cpu, path: auto, group_size: 2}
checkpoint: {every: 1, keep: 2}
"""


def small_network(classes: int, shape: tuple[int, ...]) -> nn.Module:
    """A convolution, BatchNorm and a head: the smallest network that has leaves of every role."""
    channels, height, width = shape
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(channels, 4, 3, stride=2, padding=1, bias=False),
            norm=nn.BatchNorm2d(4),
            relu=nn.ReLU(),
            flat=nn.Flatten(),
            head=nn.Linear(4 * -(-height // 2) * -(-width // 2), classes),
        )
    )


@dataclass(frozen=True)
class _Subject:
    """What is checked: a method in the config of a tiny run, which is in ``folder``."""

    name: str
    folder: Path
    overrides: Sequence[str]

    def read_config(self) -> Config:
        """The config with a new object of the method."""
        file = self.folder / "check.yaml"
        return configs.read(file, [*self.overrides, f"algorithm.name={self.name}"])

    @cached_property
    def models(self) -> tuple[Model, ...]:
        """The networks of the run."""
        config = self.read_config()
        return load_models(config, _SOURCE, load_data(config, _SOURCE))


class _Check(NamedTuple):
    """run: raises ValueError with the mistake; text: what holds if it does not."""

    run: Callable[[_Subject], None]
    text: str


def check_method(
    name: str, overrides: Sequence[str], write_line: Callable[[str], None] = print
) -> int:
    """Print a line for each check of the method ``name``; the exit code: 2 if one fails.

    overrides: ``key=value`` texts over the tiny experiment, such as fields of the method. What
    needs a run is not tried after a mistake.
    """
    results: dict[str, tuple[str, str]] = {}

    def report(check: str, level: str, text: str) -> None:
        results[check] = level, text
        write_line(escape_line(f"{level:<8} {check:<14} {' '.join(text.split())}"))

    with TemporaryDirectory(prefix="fedlora-mpi-check-") as scratch:
        subject = _Subject(name, Path(scratch), overrides)
        (subject.folder / "check.yaml").write_text(_EXPERIMENT)
        report("class", *_class_outcome(subject))
        for check, (run, text) in _CHECKS.items():
            failed = {c for c, (level, _) in results.items() if level == "mistake"}
            if "class" in failed or (check in _RUN_CHECKS and failed - {"stack"}):
                report(check, "skipped", "not tried after a mistake")
                continue
            outcome = _outcome(run, subject, text)
            # what one hook does wrong, all checks meet that call it
            is_known = outcome[0] == "mistake" and outcome in results.values()
            report(check, *(("skipped", "meets the same mistake") if is_known else outcome))
    return 2 if any(level == "mistake" for level, _ in results.values()) else 0


def _outcome(run: Callable[[_Subject], None], subject: _Subject, text: str) -> tuple[str, str]:
    """(level, text) of a check."""
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            run(subject)
    except (ValueError, CollectiveExit) as error:
        return "mistake", str(error)
    except Exception as error:  # a user's method may raise anything
        return "mistake", f"algorithm.name = {subject.name}: {describe_failure(error)}"
    return "ok", text


def _class_outcome(subject: _Subject) -> tuple[str, str]:
    """(level, text) of the check of the class; the level is "hint" if hooks may be misspelt."""
    level, text = _outcome(_check_class, subject, _CLASS_TEXT)
    doubts = misspelt_hooks(find_algorithm(subject.name)) if level == "ok" else []
    return ("hint", f"{subject.name}: {' '.join(doubts)}") if doubts else (level, text)


def _check_class(subject: _Subject) -> None:
    name = subject.name
    if ":" not in name and (name.endswith(".py") or not suggest(name, algorithm_names())):
        module = name.removesuffix(".py").replace("/", ".")
        raise ValueError(f"{name}: must be MODULE:CLASS, such as {module}:Mine")
    subject.read_config()


def _check_hook(check: Callable[[MethodTrial], None], subject: _Subject) -> None:
    config, models = subject.read_config(), subject.models
    clients = config.data.partition.clients
    with prefix_errors(_SOURCE, "algorithm"):
        try_method(
            subject.name, config.algorithm, models, config.train, clients, config.seed, [check]
        )


def _client_types(subject: _Subject) -> Sequence[ClientType]:
    """The types of clients of a run that trains them one by one. Raises for a visit or a loss that
    fails or writes in place.
    """
    config = subject.read_config()
    config = replace(config, engine=replace(config.engine, path="loop"))
    return build(config, _SOURCE, Solo()).federation.clients.types


def _check_training(subject: _Subject) -> None:
    _client_types(subject)


def _check_stack(subject: _Subject) -> None:
    """A round of two clients as one stack, and one by one."""
    for client_type in _client_types(subject):
        if objection := find_objection(client_type.trainer, client_type.initial):
            raise ValueError(
                f"algorithm.name = {subject.name}: {objection.reason}; a run trains these clients "
                "one by one"
            )


def _check_repetition(subject: _Subject) -> None:
    """Two runs from the same config."""
    first, second = (_run(subject, name) for name in ("first", "second"))
    if leaf := _difference(first, second):
        raise ValueError(
            f"algorithm.name = {subject.name}: two runs of one config differ in their {leaf} "
            "variables; draw random numbers from the generator of init, and keep nothing outside "
            "the variables"
        )


def _check_resume(subject: _Subject) -> None:
    """A run that is resumed after its first round."""
    whole, cut = subject.folder / "first", subject.folder / "cut"
    shutil.copytree(whole, cut)
    last = max((cut / "checkpoints").iterdir())
    shutil.rmtree(last)  # as if it had been killed just before this checkpoint was committed
    resume(cut, [], Solo())
    if leaf := _difference(whole, cut):
        raise ValueError(
            f"algorithm.name = {subject.name}: a resumed run differs from one without interruption "
            f"in its {leaf} variables; keep what a later round needs in the variables of init or "
            "server, not in the object"
        )


def _run(subject: _Subject, folder_name: str) -> Path:
    """The folder of a finished run."""
    folder = subject.folder / folder_name
    start(replace(subject.read_config(), output=str(folder)), _SOURCE, Solo())
    return folder


def _difference(a: Path, b: Path) -> str:
    """The part of the last checkpoints, ``shared`` or ``personal``, that differs; "" if none."""
    sums_a, sums_b = (RunFiles(run).checkpoint().digest() for run in (a, b))
    return next((part for part in sums_a if sums_a[part] != sums_b[part]), "")


_CLASS_TEXT = "a frozen dataclass, and each hook takes the right arguments"
_HOOK_TEXTS = {
    "init": "each leaf of the network has one place, and client_model finds it",
    "local": "phases and visits, and each step trains a leaf",
    "upload": "what travels is what the server expects, and nothing is written in place",
    "server_update": "the next variables have the names and shapes of the present ones",
}
_RUN_CHECKS = {
    "training": _Check(_check_training, "a client trains, and nothing is written in place"),
    "stack": _Check(_check_stack, "a stack of clients gives what one by one gives"),
    "repetition": _Check(_check_repetition, "two runs end in the same bits"),
    "resume": _Check(_check_resume, "a resumed run ends in the same bits"),
}
_CHECKS = {
    name: _Check(partial(_check_hook, check), _HOOK_TEXTS[name]) for name, check in CHECKS.items()
} | _RUN_CHECKS
