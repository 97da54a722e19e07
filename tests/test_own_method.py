"""Mistakes of a user's own method: one line that names each, before anything is trained."""

import sys

import pytest
import torch
from methods import FIELDS
from runs import TINY, package_lines
from tiers import tiered_param

from fedlora_mpi import algorithms
from fedlora_mpi.algorithm import LocalTraining, misspelt_hooks
from fedlora_mpi.algorithms import algorithm_names, find_algorithm
from fedlora_mpi.cli import main
from fedlora_mpi.config import ConfigError, read
from fedlora_mpi.core.in_place import TreeState
from fedlora_mpi.experiment.method_trial import try_method
from fedlora_mpi.models import zoo

IMPORTS = """from dataclasses import dataclass

import torch

from fedlora_mpi import Algorithm, Mix, Phase, Step, Transport, Update, Upload, Variables, Visit, split
from fedlora_mpi.algorithms.fedavg import FedAvg

"""
INIT = """def init(self, model, rng):
    head, body = split(model.initial, lambda leaf: model.role(leaf) == "{role}")
    return Variables({trees})
"""
LOCAL = "def local(self, model, train, round_):\n"
UPLOAD = "def upload(self, start, end, round_):\n"
UPDATE = "def server_update(self, server, shared, aggregate, svd):\n"
VISIT = """def init(self, model, rng):
    return Variables(model.initial, {{"seen.": torch.zeros(1)}})
def local(self, model, train, round_):
    def count(start, now, data):
        {line}
    return *super().local(model, train, round_), Visit(count)
"""
LOSS = """def loss(self, model):
    fit = super().loss(model)
    def loss(now, start, batch):
        {line}
    return loss
"""


@pytest.fixture
def method(tmp_path, monkeypatch):
    """``method(body)``: writes ``my_method.py`` with the class ``Mine``; its name in a config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])

    def write(body, head="@dataclass(frozen=True)\nclass Mine(Algorithm):"):
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        (tmp_path / "my_method.py").write_text(f"{IMPORTS}{head}\n{lines}\n")
        monkeypatch.delitem(sys.modules, "my_method", raising=False)
        return "my_method:Mine"

    yield write
    sys.modules.pop("my_method", None)


@pytest.mark.parametrize(
    "head, body, mistake",
    [
        (
            "class Mine(Algorithm):",
            "mu: float = 0.1",
            "must be a frozen dataclass; put @dataclass(",
        ),
        ("@dataclass\nclass Mine(Algorithm):", "pass", "is a dataclass that is not frozen; put "),
        ("class Mine(FedAvg):", "mu: float = 0.1", "is no dataclass of its own, so mu is no field"),
        ("class Mine(FedAvg):", "weights: str = 'uniform'", ""),
        ("class Mine(FedAvg):", "pass", ""),
    ],
)
def test_a_class_must_be_a_frozen_dataclass_of_its_own(method, head, body, mistake):
    name = method(body, head)
    if not mistake:
        read(TINY, [f"algorithm={name}"])
        return
    with pytest.raises(ConfigError, match="frozen=True") as error:
        read(TINY, [f"algorithm={name}"])
    assert f"command line: algorithm.name = {name}: {mistake}" in str(error.value)


MISTAKES = {
    "init omits leaves": (
        INIT.format(role="head", trees="body, {}"),
        "init omits 2 of 7 leaves of the network (head.weight, head.bias), so that client_model "
        "lacks them; put each leaf of model.initial into shared or personal",
    ),
    "a leaf in both trees": (
        INIT.format(role="head", trees="model.initial, head"),
        "init puts head.bias into both shared and personal; a leaf has one place",
    ),
    "a misspelt role in init": (
        INIT.format(role="heads", trees="body, head"),
        'init compares a role with "heads"; roles are body, head, norm, stats. Did you mean head?',
    ),
    "init of a pair": (
        INIT.format(role="head", trees="body, head").replace("return Variables", "return "),
        "init returns a tuple; it must return Variables(shared, personal), each a dict of tensors",
    ),
    "init of modules": (
        'def init(self, model, rng):\n    return Variables(model.initial, {"seen.": 0})',
        "init returns an int as personal['seen.']; it must be a tensor under a name",
    ),
    "init that writes": (
        "def init(self, model, rng):\n    model.initial['head.bias'].zero_()\n"
        "    return Variables(model.initial, {})",
        "init writes in place into head.bias, which it was given; return a new tensor in a new",
    ),
    "init that fails": (
        "def init(self, model, rng):\n    return model.nothing",
        "init fails: AttributeError: 'Model' object has no attribute 'nothing' (my_method.py, line",
    ),
    "a model that lacks leaves": (
        "def client_model(self, model, v):\n    return {n: v.shared[n] for n in ('head.bias',)}",
        "client_model lacks 6 of 7 leaves of the network (conv.weight, norm.weight, norm.bias ...)",
    ),
    "a misspelt role in trains": (
        f"{LOCAL}    step = Step(self.loss(model), lambda leaf: model.role(leaf) in ('bdy',))\n"
        "    return (Phase(1, (step,)),)",
        'local: trains(leaf) compares a role with "bdy"; roles are body, head, norm, stats. Did you',
    ),
    "a step that trains nothing": (
        f"{LOCAL}    return (Phase(1, (Step(self.loss(model), lambda leaf: leaf == 'heads'),)),)",
        "local: step 1 of phase 1 of 1 trains no leaf: its trains(leaf) is False for all 5 of",
    ),
    "one phase": (
        f"{LOCAL}    return Phase(1, (Step(self.loss(model)),))",
        "local returns one Phase; it must return a tuple of Phase and Visit in order of time, such",
    ),
    "no phases": (
        f"{LOCAL}    Phase(1, (Step(self.loss(model)),))",
        "local returns None; it must return a tuple of Phase and Visit in order of time",
    ),
    "a function among the phases": (
        f"{LOCAL}    return (self.loss(model),)",
        "local returns a function among its items; it must return a tuple of Phase and Visit",
    ),
    "one step": (
        f"{LOCAL}    return (Phase(1, Step(self.loss(model))),)",
        "local: phase 1 of 1 has steps = a Step; it must be a tuple of Step, such as (step,)",
    ),
    "half an epoch": (
        f"{LOCAL}    return (Phase(0.5, (Step(self.loss(model)),)),)",
        "local: phase 1 of 1 has epochs = 0.5; it must be an integer of at least 0",
    ),
    "personalize of one phase": (
        "def personalize(self, model, train, round_):\n    return Phase(1, (Step(self.loss(model)),))",
        "personalize returns one Phase; it must return a tuple",
    ),
    "an upload of a dict": (
        f"{UPLOAD}    return end.shared",
        "upload returns a dict; it must return Upload(mean=..., sum=..., mix=..., numel=..., report=...)",
    ),
    "an upload that writes": (
        f"{UPLOAD}    for v in end.shared.values():\n        v.mul_(2)\n    return Upload(end.shared)",
        "upload writes in place into conv.weight, which it was given",
    ),
    "an upload that writes to data": (
        f"{UPLOAD}    for v in end.shared.values():\n        v.data *= 2\n    return Upload(end.shared)",
        "upload writes in place into conv.weight, which it was given",
    ),
    "an upload that pops": (
        f"{UPLOAD}    end.shared.pop('head.bias')\n    return Upload(end.shared)",
        "upload changes the entry head.bias of a tree in place, which it was given",
    ),
    "an upload of fewer leaves": (
        f"{UPLOAD}    return Upload({{'head.bias': end.shared['head.bias']}})",
        "the mean of upload, compared with the shared leaves, lacks conv.weight; without a "
        "server_update the mean becomes the shared variables",
    ),
    "an upload of other names": (
        f"{UPLOAD}    return Upload(end.shared | {{'new.': torch.zeros(1)}})",
        "the mean of upload, compared with the shared leaves, has new, which is none of them;",
    ),
    "an upload of other shapes": (
        f"{UPLOAD}    return Upload({{n: v.flatten() for n, v in end.shared.items()}})",
        "leaves, has conv.weight of shape [36] instead of [4, 1, 3, 3]; without a server_update",
    ),
    "an upload in two channels": (
        f"{UPLOAD}    return Upload(end.shared, end.shared)",
        "upload puts conv.weight into both mean and sum; a leaf has one channel",
    ),
    "an update of a tuple": (
        f"{UPDATE}    return aggregate.mean, server",
        "server_update returns a tuple; it must return Update(shared, server, metrics)",
    ),
    "an update that writes": (
        f"{UPDATE}    for n, v in shared.items():\n        v.add_(aggregate.mean[n] - v + 1)\n"
        "    return Update(shared, server)",
        "server_update writes in place into conv.weight, which it was given",
    ),
    "an update that forgets the server": (
        "def server(self, model, shared):\n    return {'m.': torch.zeros(1)}\n"
        f"{UPDATE}    return Update(aggregate.mean)",
        "the server tree of server_update lacks m; it must return the names and shapes that server",
    ),
    "an update with an unknown metric": (
        f"{UPDATE}    return Update(aggregate.mean, server, {{'norm': 1.0}})",
        "server_update returns the metric norm, which is not in the class variable metrics = ()",
    ),
    "a transport of the method": (
        "def transport(self, client, clients):\n    return self",
        "transport returns a Mine; it must return Transport(method, download, expand, download_n",
    ),
    "a transport without a method": (
        "def transport(self, client, clients):\n    return Transport(client)",
        "transport returns an int as method; it must be a method, such as Transport(self)",
    ),
    "a report of a wrong shape": (
        f"{UPLOAD}    return Upload(end.shared, report=torch.ones(2, 2))",
        "the report of upload has the shape [2, 2]; it must be [k], k numbers",
    ),
    "a report that is not used": (
        f"{UPLOAD}    return Upload(end.shared, report=torch.ones(2))",
        "mean_factors fails: AssertionError: Mine reports numbers but does not use them",
    ),
    "factors of a wrong shape": (
        f"{UPLOAD}    return Upload(end.shared, report=torch.ones(2))\n"
        "def mean_factors(self, reports, round_):\n    return reports.numbers",
        "mean_factors returns a tensor of shape [2, 2] for n = 2 clients; it must return the fact",
    ),
    "factors that sum to 1": (
        f"{UPLOAD}    return Upload(end.shared, report=torch.ones(2))\n"
        "def mean_factors(self, reports, round_):\n    return torch.full((2,), 0.5)",
        "mean_factors returns [0.5, 0.5] for two clients with equal reports; factors must be at",
    ),
    "weights of a wrong shape": (
        f"{UPLOAD}    return Upload(end.shared, mix=Mix({{}}))\n"
        "def mix(self, gram, extra, round_):\n    return gram[0]",
        "mix returns a tensor of shape [2] for n = 2 clients; it must return the weights [n, n]",
    ),
}


def try_with_three_clients(name, **settings):
    """Try the method of this name in its own new network: a mistake may write into the weights."""
    model = zoo.build("user_parts:with_norm", {}, 4, (1, 8, 8), 1)
    method = algorithms.find_algorithm(name)(**settings)
    try_method(name, method, [model], LocalTraining(), clients=3, seed=1)


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_of_a_hook_is_named(method, case):
    body, mistake = MISTAKES[case]
    name = method(body)
    with pytest.raises(ValueError) as error:
        try_with_three_clients(name)
    assert str(error.value).startswith(f"name = {name}: ") and "\n" not in str(error.value)
    assert mistake in str(error.value)


@pytest.mark.parametrize("name", algorithms.algorithm_names())
def test_methods_of_the_package_have_none(name):
    try_with_three_clients(
        name,
        **({"small": "cnn"} if name in ("fml", "fedkd", "fedapen") else FIELDS.get(name, {})),
    )


def test_what_cannot_be_divided_without_training_is_no_mistake(method):
    try_with_three_clients(method(f"{UPDATE}    return 1 / 0"))


TRAINING_MISTAKES = {
    "a visit that writes": (
        VISIT.format(line="now.personal['seen.'] += 1; return now"),
        "a visit of local writes in place into seen, which it was given; return a new tensor in a",
    ),
    "a visit that returns a tree": (
        VISIT.format(line="return now.personal"),
        "a visit of local returns a dict; it must return Variables(shared, personal)",
    ),
    "a visit that writes to its data": (
        VISIT.format(line="data.x.sub_(1); return now"),
        "a visit of local writes in place into batch.x, which it was given; return a new tensor",
    ),
    "a visit that loses a leaf": (
        VISIT.format(line="return now._replace(personal={})"),
        "the result of local lacks seen; its visits must return the personal leaves of init",
    ),
    "a loss that writes": (
        LOSS.format(line="start.shared['head.bias'].add_(1); return fit(now, start, batch)"),
        "a loss of local writes in place into head.bias, which it was given",
    ),
    "a loss that writes to data": (
        LOSS.format(line="now.shared['head.bias'].data += 1; return fit(now, start, batch)"),
        "a loss of local writes in place into head.bias, which it was given",
    ),
    "a loss of each sample": (
        LOSS.format(line="return batch.x.flatten(1).sum(1)"),
        "a loss of local returns a tensor of shape [8]; it must return the mean over the batch",
    ),
    "a loss that fails": (
        LOSS.format(line="return start.personal['nothing']"),
        "one step of local training fails: KeyError: 'nothing'",
    ),
}


@pytest.mark.parametrize("case", TRAINING_MISTAKES)
def test_a_mistake_of_local_training_is_named_before_a_run(method, capsys, tmp_path, case):
    body, mistake = TRAINING_MISTAKES[case]
    name = method(body)
    norm = "model=user_parts:with_norm" if "head.bias" in body else "model=cnn"
    assert main(["run", str(TINY), f"algorithm={name}", norm, "output=out"]) == 2
    (line,) = package_lines(capsys.readouterr().err)
    assert f"{TINY}: algorithm.name = {name}: {mistake}" in line
    assert not (tmp_path / "out").exists()


def test_a_run_refuses_a_mistake_of_a_hook(method, capsys, tmp_path):
    name = method(MISTAKES["an upload of a dict"][0])
    assert main(["run", str(TINY), f"algorithm={name}", "output=out"]) == 2
    (line,) = package_lines(capsys.readouterr().err)
    assert f"{TINY}: algorithm.name = {name}: upload returns a dict; it must return Upload(" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "write, change",
    [
        (lambda tree: tree["a"].add_(1), "writes in place into a"),
        (lambda tree: tree["a"].data.add_(1), "writes in place into a"),
        (lambda tree: tree["a"].numpy().__iadd__(1), "writes in place into a"),
        (lambda tree: tree["a"][1:].zero_(), "writes in place into a"),
        (lambda tree: tree.update(a=tree["a"] + 0), "changes the entry a of a tree in place"),
        (lambda tree: tree.pop("b"), "changes the entry b of a tree in place"),
        (lambda tree: tree["a"] + 1, ""),
    ],
)
def test_a_change_of_a_tree_is_seen(write, change):
    tree = {"a": torch.arange(3.0), "b": torch.tensor([float("nan"), 1])}
    state = TreeState.of(tree)
    write(tree)
    assert state.describe_change() == change


RIGHT = [
    "class",
    "init",
    "local",
    "upload",
    "server_update",
    "training",
    "stack",
    "repetition",
    "resume",
]
WRONG = {
    "a misspelt role": (
        MISTAKES["a misspelt role in init"][0],
        {"init": 'init compares a role with "heads"; roles are body, head, norm, stats. Did you'},
        ["class"],
    ),
    "a visit that writes": (
        TRAINING_MISTAKES["a visit that writes"][0],
        {"training": "a visit of local writes in place into seen"},
        RIGHT[:5],
    ),
    "a loss that looks at numbers": (
        LOSS.format(line="return fit(now, start, batch) if batch.x.sum().item() < 1e9 else None"),
        {"stack": "cannot train in a stack (it reads numbers of a tensor"},
        [*RIGHT[:6], *RIGHT[7:]],
    ),
    "a count outside": (
        f"{UPLOAD}    COUNT[0] += 1\n"
        "    return Upload({n: v * (1 + COUNT[0] / 1000) for n, v in end.shared.items()})",
        {"repetition": "two runs of one config differ in their shared variables; draw random"},
        RIGHT[:7],
    ),
    "a memory in the object": (
        f"{UPDATE}    last = vars(self).get('last', aggregate.mean)\n"
        "    object.__setattr__(self, 'last', aggregate.mean)\n"
        "    return Update({n: (v + last[n]) / 2 for n, v in aggregate.mean.items()}, server)",
        {"resume": "a resumed run differs from one without interruption in its shared variables"},
        RIGHT[:8],
    ),
}


def lines_by_check(out):
    """{check: (level, text)} of what the command prints."""
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    return {check: (level, text) for level, check, text in lines}


def test_a_right_method_passes_every_check(method, capsys, tmp_path):
    name = method(
        VISIT.format(line="return now._replace(personal={'seen.': start.personal['seen.'] + 1})")
    )
    before = set(tmp_path.iterdir())
    assert main(["check", name]) == 0
    results = lines_by_check(capsys.readouterr().out)
    assert list(results) == RIGHT and {level for level, _ in results.values()} == {"ok"}
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "__pycache__"}


def test_a_hook_that_is_nearly_named_is_a_hint(method, call):
    name = method("def int(self, model): ...\ndef locall(self): ...\ndef twice(self): ...")
    told = f"{name}: int is no hook; did you mean init? locall is no hook; did you mean local?"
    code, out, _ = call("check", name)
    assert code == 0 and lines_by_check(out)["class"] == ("hint", told)
    _, _, err = call("run", TINY, f"algorithm={name}", "rounds=1")
    hint = f"hint: {name}: locall is no hook; did you mean local?"
    assert hint in err.splitlines() and "twice" not in err


@pytest.mark.parametrize("name", algorithm_names())
def test_no_method_of_the_package_has_a_hook_that_is_nearly_named(name):
    assert misspelt_hooks(find_algorithm(name)) == []


@pytest.mark.parametrize("given", ["mine.py", "mine"])
def test_a_check_of_a_file_says_how_to_name_the_class(call, given):
    code, out, _ = call("check", given)
    told = f"{given}: must be MODULE:CLASS, such as mine:Mine"
    assert code == 2 and lines_by_check(out)["class"] == ("mistake", told)
    assert "Did you mean fedavg" in call("check", "fedavgg")[1]


LATE = ("a loss that looks at numbers", "a count outside")  # they train twice or more


@pytest.mark.parametrize(
    "case", [tiered_param(case, id=case, thorough=case in LATE) for case in WRONG]
)
def test_a_wrong_method_fails_the_check_that_shows_it(method, capsys, case):
    body, mistakes, right = WRONG[case]
    name = method(body, "COUNT = [0]\n@dataclass(frozen=True)\nclass Mine(Algorithm):")
    assert main(["check", name]) == 2
    results = lines_by_check(capsys.readouterr().out)
    assert [check for check, (level, _) in results.items() if level == "ok"] == right
    told = {check: text for check, (level, text) in results.items() if level == "mistake"}
    assert told.keys() == mistakes.keys()
    for check, mistake in mistakes.items():
        assert f"algorithm.name = {name}: {mistake}" in told[check]


def test_a_check_takes_settings_and_refuses_others(method, capsys):
    name = method("mu: float = 0.1")
    assert main(["check", name, "algorithm.nu=0.2"]) == 2
    results = lines_by_check(capsys.readouterr().out)
    assert "algorithm.nu = 0.2: my_method:Mine has no such field" in results["class"][1]
    assert {level for check, (level, _) in results.items() if check != "class"} == {"skipped"}
