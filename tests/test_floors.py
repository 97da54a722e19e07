"""A file imports only from lower floors, outside libraries have one home, and nothing draws
unaddressed.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "fedlora_mpi"
FLOOR = {  # top-level file or folder -> floor; the package's own __init__ is its face, on no floor
    "core": 0,  # no federated meaning
    "models": 1,
    "algorithm": 2,  # the contract
    "components": 3,  # formulas that several methods share
    **dict.fromkeys(("algorithms", "data", "store"), 4),
    "mpi": 5,
    "engine": 6,
    "aggregation": 7,
    "privacy": 8,
    **dict.fromkeys(("config", "federation"), 9),
    "resilience": 10,
    "experiment": 11,
    **dict.fromkeys(("analysis", "plan"), 12),
    **dict.fromkeys(("doctor", "reproduce"), 13),
    "commands": 14,
    "cli": 15,
    "__main__": 16,
}
HOME = {
    "mpi4py": "mpi",
    "h5py": "store",
    "yaml": "config",
    "tokenizers": "data",
    "transformers": "models",
    "safetensors": "models",
    "tensorboardX": "store",
    "dp_accounting": "privacy",
}
FILES = {path.relative_to(ROOT).with_suffix("").parts: path for path in sorted(ROOT.rglob("*.py"))}
MODULES = {parts[:-1] if parts[-1] == "__init__" else parts for parts in FILES}


def own_imports(parts, tree):
    """Modules of the package, as tuples of names, that the file ``parts`` imports, also inside
    functions.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = parts[: len(parts) - node.level] + base
            elif base[0] == ROOT.name:
                base = base[1:]
            else:
                continue
            for alias in node.names:
                yield base + (alias.name,) if base + (alias.name,) in MODULES else base
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
            yield from (name[1:] for name in names if name[0] == ROOT.name)


def outside_imports(tree):
    """Top-level names of the libraries that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


def climbs(parts, tree):
    """Imports of a file that do not go down."""
    for other in own_imports(parts, tree):
        if not other:  # the package itself: its version
            continue
        siblings = len(parts) > 1 and other[0] == parts[0]
        if siblings and (
            parts[0] != "algorithms" or "__init__" in parts or other == ("algorithms",)
        ):
            continue
        if not FLOOR[other[0]] < FLOOR[parts[0]]:
            yield ".".join(other)


@cache
def parsed():
    return {
        parts: ast.parse(path.read_text())
        for parts, path in FILES.items()
        if parts != ("__init__",)
    }


def test_every_file_has_a_floor():
    assert {parts[0] for parts in FILES} - {"__init__"} == set(FLOOR)


def test_files_import_only_from_lower_floors():
    found = {".".join(parts): list(climbs(parts, tree)) for parts, tree in parsed().items()}
    assert {name: up for name, up in found.items() if up} == {}


def test_no_test_file_imports_another():
    """What two of them need is a fixture of ``conftest.py`` or a module without ``test_``."""
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import | ast.ImportFrom)
                else []
            )
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("test_")], (
                f"{path.name}:{node.lineno}"
            )


@pytest.mark.parametrize("library, home", HOME.items())
def test_a_library_has_one_home(library, home):
    users = {parts[0] for parts, tree in parsed().items() if library in outside_imports(tree)}
    assert users == {home}


def test_algorithms_see_nothing_that_runs_them():
    for parts, tree in parsed().items():
        if parts[0] == "algorithms":
            above = {other[0] for other in own_imports(parts, tree) if other}
            assert above <= {"core", "models", "algorithm", "components", "algorithms"}, parts


def test_a_run_never_imports_the_analysis():
    trees, met, ahead = (
        parsed(),
        set(),
        [
            ("experiment", "loop"),
            ("experiment", "assembly"),
            ("federation", "round"),
            ("plan", "__init__"),
        ],
    )
    while ahead:
        parts = ahead.pop()
        met.add(parts)
        for other in own_imports(parts, trees[parts]):
            file = other if other in FILES else (*other, "__init__")
            if other and file not in met:
                ahead.append(file)
    assert ("models", "zoo") in met and not [parts for parts in met if parts[0] == "analysis"]


@pytest.mark.parametrize(
    "parts, source",
    [
        (("core", "seeds"), "from ..aggregation.flat_layout import Layout"),
        (("core", "seeds"), "def f():\n    from ..federation import round"),
        (("data", "feed"), "from ..engine.train import Trainer"),
        (("data", "feed"), "import fedlora_mpi.federation.round"),
        (("algorithms", "fedlora"), "from .fedavg import FedAvg"),
        (("algorithms", "fedlora"), "from . import fedavg"),
        (("algorithms", "fedlora"), "from fedlora_mpi.mpi.comm import Solo"),
        (("aggregation", "client_mix"), "from ..config import Config"),
    ],
)
def test_an_import_that_climbs_is_seen(parts, source):
    assert list(climbs(parts, ast.parse(source)))


# Nothing calls a global generator.

DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
DRAWS |= {f"{name}_like" for name in ("rand", "randn", "randint")}
IN_PLACE = {
    "normal_",
    "uniform_",
    "random_",
    "bernoulli_",
    "exponential_",
    "log_normal_",
    "cauchy_",
    "geometric_",
}
ISOLATING = {  # in ``seeds.isolated``, which puts the states back
    "torch.random.default_generator.manual_seed",
    *(f"random.{name}" for name in ("getstate", "seed", "setstate")),
    *(f"numpy.random.{name}" for name in ("get_state", "seed", "set_state")),
}
# of numpy.random
ADDRESSED = {"RandomState", "default_rng", "Generator", "SeedSequence", "PCG64", "Philox", "SFC64"}


def full_name(node, aliases):
    """'torch.rand' for the callee ``t.rand`` after ``import torch as t``; None when it starts at no
    import.
    """
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in aliases:
        return None
    return ".".join([aliases[node.id], *reversed(names)])


def unaddressed(tree):
    """Calls that draw from a global generator, or seed one."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and not node.level:
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = any(keyword.arg == "generator" for keyword in node.keywords)
        name = full_name(node.func, aliases) or ""
        home, _, last = name.rpartition(".")
        if (
            home.split(".")[0] == "torch"
            and (last.startswith(("manual_seed", "seed")) or last == "set_rng_state")
            or home == "torch"
            and last in DRAWS
            and not given
            or home == "numpy.random"
            and last not in ADDRESSED
            or home == "random"
        ):
            yield name
        elif last in ADDRESSED and home == "numpy.random" and not node.args + node.keywords:
            yield name  # numpy seeds it from the system
        elif isinstance(node.func, ast.Attribute) and node.func.attr in IN_PLACE and not given:
            yield name or node.func.attr


def test_nothing_draws_from_a_global_generator():
    found = {
        ".".join(parts): list(unaddressed(ast.parse(path.read_text())))
        for parts, path in FILES.items()
    }
    assert set(found.pop("core.seeds")) == ISOLATING
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "source, seen",
    [
        ("import torch\ntorch.manual_seed(3)", True),
        ("import torch\ntorch.cuda.manual_seed_all(3)", True),
        ("import torch as t\nt.randperm(5)", True),
        ("from torch import randn\nrandn(3, 5)", True),
        ("import torch\ntorch.randperm(5, generator=g)", False),
        ("import numpy as np\nnp.random.permutation(5)", True),
        ("import numpy as np\nnp.random.RandomState(5).permutation(5)", False),
        ("from numpy.random import default_rng\ndefault_rng()", True),
        ("from numpy.random import shuffle\nshuffle(x)", True),
        ("import random\nrandom.shuffle(x)", True),
        ("from random import choice\nchoice(x)", True),
        ("x.normal_()", True),
        ("x.normal_(generator=g)", False),
    ],
)
def test_an_unaddressed_draw_is_seen(source, seen):
    assert bool(list(unaddressed(ast.parse(source)))) is seen
