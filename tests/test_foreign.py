"""Modules of the user's own: they may import torchvision, raise anything, and draw from global
generators.
"""

import inspect
import random
import re
import sys

import numpy as np
import pytest
import torch
from runs import TINY, command_line, package_lines, run_process

import fedlora_mpi
from fedlora_mpi.algorithm import HOOKS, Algorithm
from fedlora_mpi.algorithms import find_algorithm
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.cli import main
from fedlora_mpi.core import user_code as foreign
from fedlora_mpi.core.former_hooks import FORMER_HOOKS

MODEL = """
from torch import nn

def net(classes, shape):
    {line}
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported; the working folder is that of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield write
    for name in ("mine_own", "my_method"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "line, text",
    [
        (
            "raise RuntimeError('no weights\\n  here')",
            "RuntimeError: no weights here (mine_own.py, line 5)",
        ),
        ("raise KeyError('width')", "KeyError: 'width' (mine_own.py, line 5)"),
        (
            "open('nowhere')",
            "FileNotFoundError: [Errno 2] No such file or directory: 'nowhere' (mine_own.py, line "
            "5)",
        ),
        ("import nowhere", "No module named 'nowhere'"),
        ("[][3]", "IndexError: list index out of range (mine_own.py, line 5)"),
        ("assert False", "AssertionError (mine_own.py, line 5)"),
        ("exit(3)", "SystemExit: 3 ("),
        ("1 / 0", "ZeroDivisionError: division by zero (mine_own.py, line 5)"),
        ("return net(classes, shape)", "RecursionError: maximum recursion depth exceeded"),
        ("raise ValueError('width = 3: must be 5')", "cannot be built: width = 3: must be 5"),
    ],
)
def test_whatever_a_builder_raises_is_one_line(module, capsys, tmp_path, line, text):
    module("mine_own", MODEL.format(line=line))
    assert main(["run", str(TINY), "model=mine_own:net", "output=out"]) == 2
    (told,) = package_lines(capsys.readouterr().err)
    assert f"{TINY}: model.name = mine_own:net: cannot be built: " in told and text in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, told",
    [
        ("x = ", "SyntaxError: invalid syntax (my_method.py, line 1)"),
        (
            "raise RuntimeError('torch is too old')",
            "RuntimeError: torch is too old (my_method.py, line 1)",
        ),
        ("raise SystemExit", "SystemExit (my_method.py, line 1)"),
        ("undefined", "NameError: name 'undefined' is not defined (my_method.py, line 1)"),
        ("import nowhere", "No module named 'nowhere'"),
        ("x = 3", "has no attribute 'Mine'"),
    ],
)
@pytest.mark.parametrize("key", ["algorithm", "model"])
def test_whatever_a_module_raises_when_it_is_imported_is_one_line(module, capsys, key, text, told):
    module("my_method", text)
    assert main(["run", str(TINY), f"{key}=my_method:Mine", "output=out"]) == 2
    (line,) = package_lines(capsys.readouterr().err)
    assert f"{key}.name = my_method:Mine: cannot be " in line and told in line


METHOD = (
    "from torchvision.models import resnet18\nfrom fedlora_mpi.algorithms.fedavg import FedAvg as "
    "Mine\n"
)


@pytest.mark.thorough
def test_a_run_of_modules_that_import_torchvision(module, tmp_path):
    module("mine_own", f"import torchvision\n{MODEL.format(line='import torchvision.ops')}")
    module("my_method", METHOD)
    line = ["run", TINY, "rounds=1", "model=mine_own:net", "algorithm=fedavg", "output=out"]
    ended = run_process(command_line(*line), tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_modules_of_the_users_may_import_torchvision_and_nothing_else_does(module, tmp_path):
    module("my_method", METHOD)
    code = (
        "import sys; from fedlora_mpi.cli import main; from fedlora_mpi.config import "
        "read;from fedlora_mpi.experiment.assembly import build; from fedlora_mpi.mpi.comm import Solo; "
        f"build(read({str(TINY)!r}), 'x', Solo());assert 'torchvision' not in sys.modules;"
        "from fedlora_mpi.algorithms import find_algorithm; find_algorithm('my_method:Mine'); assert 'torchvision' in "
        "sys.modules"
    )
    ended = run_process([sys.executable, "-c", code], tmp_path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.thorough
def test_a_module_that_imports_torchvision_may_be_the_first(module, tmp_path):
    module("my_method", METHOD)
    code = "from fedlora_mpi.algorithms import find_algorithm; find_algorithm('my_method:Mine')"
    ended = run_process([sys.executable, "-c", code], tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_what_a_module_draws_at_its_import_is_the_same_everywhere_and_moves_no_draw(module):
    text = (
        "import random, numpy, torch\nDRAWN = [random.random(), numpy.random.rand(), "
        "float(torch.rand(()))]\n"
    )
    found = []
    for seed in (3, 5):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        module("mine_own", text)
        before = (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )
        found.append(foreign.import_object("mine_own:DRAWN"))
        assert (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        ) == before
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["random", "copy", "yaml"])
def test_a_file_that_a_library_hides_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / f"{name}.py").write_text("def net(classes, shape): ...")
    with pytest.raises(
        ValueError,
        match=f"{name} is a module of Python or of a library, which comes before .*{name}.py; rename",
    ):
        foreign.import_object(f"{name}:net")


METHODS = {
    "one place": "from fedlora_mpi import Algorithm, Variables as Vars, bounded, split",
    "former names": "from fedlora_mpi import Algorithm, Offer, Train, Vars, bounded, split",
    "the modules of before": "from fedlora_mpi.algorithm import Algorithm, Vars\n"
    "from fedlora_mpi.bounds import bounded\nfrom fedlora_mpi.tree import split",
    "their whole names": "import fedlora_mpi.tree\nfrom fedlora_mpi.algorithm import Algorithm, Vars\n"
    "from fedlora_mpi.bounds import bounded\nsplit = fedlora_mpi.tree.split",
}


@pytest.mark.parametrize("imports", METHODS)
def test_a_method_may_import_from_the_documented_places(module, tmp_path, imports):
    module(
        "my_method",
        f"{METHODS[imports]}\nclass Mine(Algorithm):\n    need = Vars, bounded, split\n",
    )
    assert foreign.import_object("my_method:Mine").__module__ == "my_method"


PAGE = "docs/add_a_method.md has all hooks"


@pytest.mark.parametrize("former", FORMER_HOOKS)
@pytest.mark.parametrize("where", ["Mine(Algorithm)", "Mine(Mixin, Algorithm)", "Mine(FedAvg)"])
def test_a_former_hook_is_refused_with_what_replaces_it(module, former, where):
    base = f"class Mixin:\n    def {former}(self): ...\n" if "Mixin" in where else ""
    body = "pass" if base else f"def {former}(self, *given): ..."
    imports = (
        "from fedlora_mpi import Algorithm\nfrom fedlora_mpi.algorithms.fedavg import FedAvg\n"
    )
    module("my_method", f"{imports}{base}class {where}:\n    {body}\n")
    with pytest.raises(ValueError) as error:
        foreign.import_object("my_method:Mine")
    assert str(error.value) == f"Mine.{former}: replaced by {FORMER_HOOKS[former]}; {PAGE}"
    assert "\n" not in str(error.value)


def test_a_field_may_have_the_name_of_a_former_hook_but_not_of_a_former_flag(module):
    text = (
        "from dataclasses import dataclass\nfrom fedlora_mpi import Algorithm\n"
        "@dataclass(frozen=True)\nclass Mine(Algorithm):\n    {}: int = 4\n"
    )
    module("my_method", text.format("low_rank"))
    assert foreign.import_object("my_method:Mine")().low_rank == 4
    module("other_method", text.format("sums"))
    with pytest.raises(ValueError, match=r"Mine\.sums: replaced by upload"):
        foreign.import_object("other_method:Mine")


def test_the_class_of_a_former_argument_names_what_replaces_it(module):
    module("my_method", "from fedlora_mpi.algorithm import Algorithm, Cohort\n")
    with pytest.raises(ValueError, match="Cohort: server_update receives an Aggregate now"):
        find_algorithm("my_method:Mine")


def test_the_replacements_of_former_hooks_are_what_the_contract_has():
    for replacement in set(FORMER_HOOKS.values()):
        for hook, parameters in re.findall(r"\b(\w+)\(([\w, ]+)\)", replacement):
            if hook in HOOKS:
                taken = [*inspect.signature(getattr(Algorithm, hook)).parameters]
                assert taken == ["self", *parameters.split(", ")], hook


# {hook: parameters that it does not take, those that it takes}
WRONG_SIGNATURES = {
    "upload": ("start, end", "start, end, round_"),
    "server_update": ("server, shared, mean, cohort", "server, shared, aggregate, svd"),
    "personalize": ("model, train", "model, train, round_"),
    "check": ("model", "model, train"),
    "init": ("model", "model, rng"),
    "local": ("model, train", "model, train, round_"),
    "loss": ("model, train", "model"),
    "transport": ("client", "client, clients"),
    "server": ("shared", "model, shared"),
    "mean_factors": ("reports", "reports, round_"),
    "mix": ("gram, extra", "gram, extra, round_"),
    "client_model": ("v", "model, v"),
    "logits": ("model, v", "model, v, x"),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_with_other_parameters_is_refused_with_those_it_must_take(module, hook):
    given, taken = WRONG_SIGNATURES[hook]
    text = "from fedlora_mpi import Algorithm\nclass Mine(Algorithm):\n    def {}(self, {}): ...\n"
    module("my_method", text.format(hook, given))
    with pytest.raises(ValueError) as error:
        foreign.import_object("my_method:Mine")
    assert str(error.value) == f"Mine.{hook}({given}): must take ({taken}); {PAGE}"
    module("my_method", text.format(hook, taken))
    assert foreign.import_object("my_method:Mine").__name__ == "Mine"


@pytest.mark.parametrize("given", ["server, shared, mean, cohort", "server, shared, mean, svd"])
def test_an_update_from_the_mean_alone_is_refused(module, given):
    module(
        "my_method",
        "from fedlora_mpi import Algorithm\nclass Mine(Algorithm):\n"
        f"    def server_update(self, {given}):\n        return server, mean\n",
    )
    with pytest.raises(ValueError, match=r"must take \(server, shared, aggregate, svd\)"):
        foreign.import_object("my_method:Mine")


@pytest.mark.parametrize(
    "line, told",
    [
        ("def phases(self, model, train, round_): ...", "Mine.phases: replaced by local(model, "),
        ("needs_all_data = True", "Mine.needs_all_data: replaced by Visit(apply, all_data=True)"),
        (
            "def server_update(self, server, shared, mean, cohort): ...",
            "Mine.server_update(server, shared, mean, cohort): must take (server, shared, ",
        ),
    ],
)
def test_a_command_refuses_a_former_method_in_one_line(module, capsys, tmp_path, line, told):
    module("my_method", f"from fedlora_mpi import Algorithm\nclass Mine(Algorithm):\n    {line}\n")
    assert main(["run", str(TINY), "algorithm=my_method:Mine", "output=out"]) == 2
    (said,) = package_lines(capsys.readouterr().err)
    assert "algorithm.name = my_method:Mine: cannot be " in said and told in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("former", FORMER_HOOKS)
def test_a_call_of_a_former_hook_names_what_replaces_it(former):
    with pytest.raises(AttributeError) as error:
        getattr(FedAvg(), former)
    told = f"FedAvg has no attribute {former}; instead there is {FORMER_HOOKS[former]}"
    assert str(error.value) == told


def test_the_face_of_the_package_has_what_it_names():
    assert all(hasattr(fedlora_mpi, name) for name in fedlora_mpi.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fedlora_mpi.nothing  # noqa: B018
