"""``engine.compile``: the traced step is the step, for every method;
the compiled one is as good."""

import shutil
from functools import partial

import pytest
import torch
from methods import SETTINGS
from runs import NORM, assert_near, run_rounds, snapshots_equal
from tiers import thorough_param

from fedlora_mpi import algorithms
from fedlora_mpi.cli import main
from fedlora_mpi.engine import compiled
from fedlora_mpi.engine.compiled import StepCompiler

KINDS = ("loop", "stack")
SOME = ("rounds=2", "train.epochs=2", "participation=1.0")


@pytest.fixture
def traced(monkeypatch):
    """Graphs as they are traced, without the compiler; a list of them."""
    made = []
    monkeypatch.setattr(compiled.torch, "compile", lambda graph, **how: made.append(graph) or graph)
    return made


FEW = ("fedlora", "moon")  # a product formed once a phase, a teacher
# in what their steps do
UNLIKE = (*FEW, "scaffold", "fedrep", "pfedgate", "fedkd", "fedhl", "fedala")
OTHERS = [
    thorough_param(name, id=name) for name in algorithms.algorithm_names() if name not in UNLIKE
]


@pytest.mark.parametrize("name", [*FEW, *map(thorough_param, UNLIKE[len(FEW) :]), *OTHERS])
def test_a_traced_step_has_the_bits_of_the_step(name, traced):
    how = (f"algorithm={name}", NORM, *SOME, *SETTINGS.get(name, ()))
    plain = run_rounds(*how, "engine.compile=false")[0]
    with_graphs = run_rounds(*how, "engine.compile=true", "checkpoint.keep=3")[0]
    assert all(snapshots_equal(a, b) for a, b in zip(plain, with_graphs, strict=True))
    assert traced


@pytest.mark.parametrize("path", [thorough_param("loop"), "stack"])
def test_a_graph_serves_all_rounds(path, traced):
    run_rounds(
        "algorithm=fedlora",
        NORM,
        "rounds=2",
        "engine.compile=true",
        f"engine.path={path}",
        "checkpoint.keep=4",
    )
    few = len(traced)
    run_rounds(
        "algorithm=fedlora",
        NORM,
        "rounds=6",
        "engine.compile=true",
        f"engine.path={path}",
        "checkpoint.keep=4",
    )
    assert few > 0 and len(traced) - few <= few + 2  # a stack of another width may come later


@pytest.mark.thorough  # two real compilations
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("path", KINDS)
def test_a_compiled_step_gives_the_numbers_of_the_step(path):
    how = ("algorithm=fedavg", NORM, *SOME, f"engine.path={path}", "engine.group_size=7")
    plain, fused = run_rounds(*how)[0], run_rounds(*how, "engine.compile=true")[0]
    assert_near(plain[-1].shared, fused[-1].shared)
    assert not snapshots_equal(plain[0], fused[-1])


def test_a_missing_compiler_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["plan", "configs/quickstart.yaml", "engine.compile=true"]) == 2
    assert (
        "engine.compile = true: there is no C++ compiler no-such-compiler"
        in capsys.readouterr().err
    )


# What a graph is known by.


def times(factor):
    return lambda x, y: x.mul_(factor).add_(y)


def test_a_step_writes_to_what_it_is_given(traced):
    x = torch.ones(3)
    play = StepCompiler().compile_step(times(2.0), (times(2.0),), x)
    play(torch.tensor([1.0, 2.0, 3.0]))
    assert x.tolist() == [3.0, 4.0, 5.0]
    play(torch.zeros(3))
    assert x.tolist() == [6.0, 8.0, 10.0] and len(traced) == 1


@pytest.mark.parametrize(
    "a, b, equal",
    [
        (times(2.0), times(2.0), True),
        (times(2.0), times(3.0), False),
        (partial(times(2.0), 1), partial(times(2.0), 1), True),
        (partial(times(2.0), 1), partial(times(2.0), 2), False),
        (
            times(algorithms.find_algorithm("fedprox")(mu=1.0)),
            times(algorithms.find_algorithm("fedprox")(mu=1.0)),
            True,
        ),
        (
            times(algorithms.find_algorithm("fedprox")(mu=1.0)),
            times(algorithms.find_algorithm("fedprox")(mu=2.0)),
            False,
        ),
        (times({"a": [1, 2]}), times({"a": [1, 2]}), True),
        (times({"a": [1, 2]}), times({"a": [1, 3]}), False),
        (times(torch.ones(1)), times(torch.ones(1)), False),  # another tensor may be written to
        (1, 1.0, False),
        (0, False, False),
    ],
)
def test_functions_are_equal_by_their_code_and_what_they_hold(a, b, equal):
    assert (compiled.identity_key(a, []) == compiled.identity_key(b, [])) is equal


def test_another_layout_is_another_graph_and_the_oldest_goes(traced, monkeypatch):
    monkeypatch.setattr(compiled, "_MAX_GRAPHS", 2)
    cache = StepCompiler()
    for size in (1, 2, 1, 3, 2, 1):
        x = torch.ones(size)
        cache.compile_step(times(2.0), (times(2.0),), x)(torch.ones(size))
        assert x.tolist() == [3.0] * size
    assert len(traced) == 4  # the third took the place of the first
