"""Leaves of other dtypes than float32: none loses its dtype or its numbers, whatever the method and
the way.
"""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import TINY, assert_same_run, run_on_ranks, run_rounds, snapshots_equal
from tiers import thorough_param
from torch import nn

import fedlora_mpi
from fedlora_mpi.aggregation.flat_layout import Layout, estimate_nbytes
from fedlora_mpi.aggregation.svd import right_vectors
from fedlora_mpi.analysis.run_view import open_run
from fedlora_mpi.cli import main
from fedlora_mpi.models import weights, zoo

METHODS = (
    "fedavg",
    "fedlora",
    "fedprox",
    "scaffold",
    "fedamp",
    "fedbn",
    "fedadam",
    "fedit",
    "pfedlora",
)
# with leaves of clients, of both, of a mix, of the server
FEW = ("fedlora", "scaffold", "fedamp", "fedadam")


class Mixed(nn.Module):
    """A convolution, a float64 buffer that nobody moves, and a float64 parameter where ``fine``;
    computes in ``dtype``.
    """

    def __init__(
        self,
        classes: int,
        shape: tuple[int, ...],
        fine: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.dtype = dtype
        self.conv = nn.Conv2d(shape[0], 4, 3, stride=2, padding=1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.head = nn.Linear(4 * (shape[1] // 2) * (shape[2] // 2), classes)
        self.to(dtype)  # the same numbers in every dtype
        if fine:
            self.scale = nn.Parameter(self.scale.double())
        self.register_buffer("shift", torch.from_numpy(np.array([0.1])))

    def forward(self, x):
        z = self.conv(x.to(self.dtype) - self.shift.to(self.dtype)).relu()
        return self.head((z * self.scale).to(self.dtype).flatten(1))


def coarse(classes, shape):
    """Float32 but for the buffer."""
    return Mixed(classes, shape)


def fine(classes, shape):
    """Float32 but for the buffer and a parameter."""
    return Mixed(classes, shape, fine=True)


def double(classes, shape):
    return Mixed(classes, shape, dtype=torch.float64)


def half(classes, shape):
    return Mixed(classes, shape, dtype=torch.float16)


def brain(classes, shape):
    return Mixed(classes, shape, dtype=torch.bfloat16)


def of(method: str, network: str, *overrides: str, rounds: int = 2) -> tuple[str, ...]:
    plain = ("train.momentum=0",) if method == "scaffold" else ()
    return (
        f"algorithm={method}",
        f"model=test_dtypes:{network}",
        f"rounds={rounds}",
        *plain,
        *overrides,
    )


def few(*more):
    """The parameters (method, *more) of all METHODS; those beside FEW are thorough."""
    return [(name, *more) if name in FEW else thorough_param(name, *more) for name in METHODS]


# --- a vector of all leaves


def test_leaves_come_back_in_their_own_dtypes():
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    tree = {str(kind): torch.tensor([[1 / 3, -2.0]], dtype=kind) for kind in kinds}
    layout = Layout.of(tree)
    vector = layout.pack(tree)
    back = layout.unpack(vector)
    assert (
        vector.dtype == torch.float64
        and layout.nbytes == 2 * (4 + 8 + 2 + 2)
        and estimate_nbytes(8, [layout]) == 32
    )
    assert all(back[n].dtype == v.dtype and torch.equal(back[n], v) for n, v in tree.items())
    vector[2] = 7.0
    assert tree["torch.float64"][0, 0] == 1 / 3 and back["torch.float64"][0, 0] == 7.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.bool, torch.int64])
def test_coarse_numbers_travel_as_float32_or_as_whole_ones(dtype):
    tree = {"a": torch.ones(3, dtype=dtype), "b": torch.ones(2)}
    layout = Layout.of(tree)
    assert layout.pack(tree).dtype == layout.dtype == torch.float32
    mean = layout.unpack(torch.full((5,), 0.5, dtype=torch.float64))["a"]
    assert (
        mean.dtype == (dtype if dtype.is_floating_point else torch.float32)
        and mean.tolist() == [0.5] * 3
    )


def test_layouts_differ_in_dtypes():
    one, other = {"a": torch.zeros(3)}, {"a": torch.zeros(3, dtype=torch.float64)}
    assert Layout.of(one).digest() != Layout.of(other).digest()


def test_clients_whose_networks_differ_in_a_dtype_are_refused_in_one_line(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    mix = "model={mix: ['test_dtypes:coarse', 'test_dtypes:fine']}"
    assert main(["run", str(TINY), "algorithm=fedavg", mix, "engine.group_size=1"]) == 2
    assert "shares scale, which networks" in (said := capsys.readouterr().err) and "float64" in said


# --- runs


@pytest.mark.parametrize(
    "method, network", [*few("coarse"), ("fedavg", "fine"), thorough_param("fedlora", "fine")]
)
def test_a_float64_leaf_changes_nothing_but_itself(method, network):
    """The variables are those of a network of which every leaf is float64."""
    found, exact = (run_rounds(*of(method, name, rounds=1))[0][-1] for name in (network, "double"))
    for name, value in (found.shared | found.personal).items():
        torch.testing.assert_close(
            value.double(), (exact.shared | exact.personal)[name].double(), rtol=1e-2, atol=1e-3
        )
        if name.endswith("shift"):
            assert value.dtype == torch.float64 and (value == 0.1).all()
        if name.endswith("scale"):
            assert value.dtype == (torch.float64 if network == "fine" else torch.float32)


@pytest.mark.parametrize(
    "method, network, more",
    [
        *few("fine", ()),
        ("fedavg", "fine", ("uplink=gather",)),
        thorough_param("fedit", "fine", ("uplink=gather", "algorithm.full=[head, norm]")),
        ("fedpac", "fine", ("mix=spread", "uplink=gather")),
        thorough_param("fedamp", "half", ("mix=spread",)),
        thorough_param("fedavg", "brain", ("uplink=gather",)),
    ],
)
def test_two_ranks_have_the_bits_of_one(method, network, more):
    overrides = of(method, network, *more)
    alone, together = run_rounds(*overrides)[0], run_rounds(*overrides, ranks=2)[0]
    assert all(map(snapshots_equal, alone, together))


def test_gathered_uploads_of_float64_are_those_that_are_summed():
    a, b = (
        run_rounds(*of("fedavg", "fine", f"uplink={way}"), ranks=2)[0][-1]
        for way in ("gather", "sum")
    )
    assert all(torch.equal(v, b.shared[n]) for n, v in a.shared.items())


@pytest.mark.parametrize(
    "method",
    [thorough_param("fedavg"), thorough_param("scaffold"), thorough_param("fedlora"), "fedadam"],
)
def test_a_fast_sum_keeps_float64(method):
    fast, exact = (
        run_rounds(*of(method, "double", f"reduce={way}"))[0][-1] for way in ("fast", "exact")
    )
    for name, value in exact.shared.items():
        torch.testing.assert_close(fast.shared[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("network, dtype", [("half", torch.float16), ("brain", torch.bfloat16)])
@pytest.mark.parametrize(
    "method",
    [
        "fedlora",
        "fedadam",
        *map(thorough_param, ("fedavg", "fedamp", "scaffold", "fedit", "pfedlora")),
    ],
)
def test_half_numbers_come_back_as_what_they_were(method, network, dtype):
    end = run_rounds(*of(method, network))[0][-1]
    network_names = {"conv.weight", "scale", "head.weight", "head.bias"}
    assert {v.dtype for n, v in (end.shared | end.personal).items() if n in network_names} == {
        dtype
    }
    assert end.row["accuracy"] > 0.4


def test_loop_and_stack_agree_on_float64():
    stack, loop = (
        run_rounds(*of("fedavg", "double", f"engine.path={path}"))[0][-1]
        for path in ("stack", "loop")
    )
    for name, value in stack.shared.items():
        torch.testing.assert_close(loop.shared[name], value, rtol=1e-10, atol=1e-12)


def test_a_tiny_step_leaves_a_network_what_it_was():
    before, after = run_rounds(*of("fedavg", "coarse", "train.lr=1e-9", rounds=1))[0]
    for name, value in before.shared.items():
        torch.testing.assert_close(after.shared[name], value, rtol=0, atol=1e-6)


def test_bytes_follow_the_dtypes():
    coarse, double, half = (
        run_rounds(*of("fedavg", n))[0][-1].row["bytes_up"] for n in ("coarse", "double", "half")
    )
    numbers = (double // 8 - 4) // 4  # of each of 4 clients, beside the buffer
    assert (coarse, half) == (4 * (4 * numbers + 8), 4 * (2 * numbers + 8))


def test_noise_and_clipping_keep_the_dtypes():
    overrides = of("fedprox", "fine", "privacy={clip: 1.0, noise_multiplier: 0.5}")
    with_buffer = run_rounds(*overrides[:1], "model=test_dtypes:no_buffer", *overrides[2:])[0][-1]
    assert (
        with_buffer.shared["scale"].dtype == torch.float64
        and with_buffer.shared["head.bias"].dtype == torch.float32
    )


class NoBuffer(Mixed):
    def __init__(self, classes, shape):
        super().__init__(classes, shape, fine=True)
        del self.shift
        self.shift = torch.tensor([0.1])


def no_buffer(classes, shape):
    return NoBuffer(classes, shape)


# --- files


@pytest.mark.parametrize(
    "network, method",
    [("fine", "fedbn"), thorough_param("brain", "ditto"), thorough_param("half", "fedavg")],
)
def test_a_resumed_run_ends_in_the_same_bits_and_its_models_have_their_dtypes(
    tmp_path, monkeypatch, network, method
):
    monkeypatch.chdir(tmp_path)
    overrides = [*of(method, network), "checkpoint.every=1"]
    assert main(["run", str(TINY), *overrides, "output=whole"]) == 0
    assert main(["run", str(TINY), *overrides, "output=parts", "rounds=1"]) == 0
    assert main(["resume", "parts", "rounds=2"]) == 0
    assert_same_run(Path("whole"), Path("parts"))
    module = open_run("parts").client(1).model
    expected = globals()[network](4, (3, 8, 8))
    assert {n: v.dtype for n, v in module.state_dict().items()} == {
        n: v.dtype for n, v in expected.state_dict().items()
    }
    assert main(["export", "parts", "--client", "1", "--to", "a.pt"]) == 0
    saved = torch.load("a.pt", weights_only=True)
    assert all(
        torch.equal(saved[n], v) and saved[n].dtype == v.dtype
        for n, v in module.state_dict().items()
    )


def test_weights_from_a_file_keep_the_networks_dtypes(tmp_path):
    exact = {
        n: v + 1 / 3
        for n, v in zoo.build("test_dtypes:double", {}, 4, (3, 8, 8), 1).initial.items()
    }
    torch.save(exact, tmp_path / "a.pt")
    assert weights.read(tmp_path / "a.pt")["scale"].dtype == torch.float32
    for network in ("fine", "double", "half"):
        model = zoo.build(
            f"test_dtypes:{network}", {}, 4, (3, 8, 8), 2, weights=str(tmp_path / "a.pt")
        )
        blank = zoo.build(f"test_dtypes:{network}", {}, 4, (3, 8, 8), 2)
        for name, value in model.initial.items():
            assert value.dtype == blank.initial[name].dtype and torch.equal(
                value, exact[name].to(value.dtype)
            ), name
    torch.save(exact | {"scale": 1e6 * exact["scale"]}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="scale has numbers that are not finite as torch.float16"):
        zoo.build("test_dtypes:half", {}, 4, (3, 8, 8), 2, weights=str(tmp_path / "b.pt"))


def test_vectors_that_ranks_share_out_are_those_of_one(monkeypatch):
    monkeypatch.setattr("fedlora_mpi.aggregation.svd._MIN_SHARED_FLOP", 0)
    matrices = {
        str(kind): (
            torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
                kind
            ),
            2,
        )
        for kind in (torch.float32, torch.float64)
    }
    alone, together = (
        run_on_ranks(1, lambda comm: right_vectors(comm, matrices))[0],
        run_on_ranks(2, lambda comm: right_vectors(comm, matrices))[1],
    )
    assert all(torch.equal(alone[n], v) and v.dtype == alone[n].dtype for n, v in together.items())


# --- the kind


_MAY_ALIAS = {
    *(
        "to",
        "type",
        "type_as",
        "double",
        "float",
        "half",
        "bfloat16",
        "long",
        "int",
        "bool",
        "cpu",
        "cuda",
        "numpy",
    ),
    *(
        "contiguous",
        "reshape",
        "flatten",
        "ravel",
        "as_tensor",
        "asarray",
        "ascontiguousarray",
        "to_host",
        "to_device",
    ),
}


def may_alias(node: ast.AST) -> bool:
    """Whether an expression is a conversion that gives back what it was given where there is
    nothing to convert.
    """
    if isinstance(node, ast.Subscript):
        return may_alias(node.value)
    if isinstance(node, ast.Tuple):
        return any(map(may_alias, node.elts))
    if not isinstance(node, ast.Call) or any(keyword.arg == "copy" for keyword in node.keywords):
        return False
    return (
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    ) in _MAY_ALIAS


def overwritten(tree: ast.AST) -> list[int]:
    """The lines in which an in-place operation follows such a conversion, directly or by a name."""
    found = []
    for function in (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.Module)
    ):
        made = (
            node
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and may_alias(node.value)
        )
        single = {n.id for node in made for n in node.targets if isinstance(n, ast.Name)}

        def converted(node, single=single):
            return may_alias(node) or (isinstance(node, ast.Name) and node.id in single)

        for node in ast.walk(function):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr[-1:] == "_"
            ):
                at = node.func.value
            elif isinstance(node, ast.AugAssign):
                at = node.target
            else:
                continue
            while isinstance(at, ast.Subscript):
                at = at.value
            found += [node.lineno] if node.lineno not in found and converted(at) else []
    return found


@pytest.mark.parametrize(
    "line",
    [
        "v.double().sub_(w)",
        "v.cpu()[1:].add_(w)",
        "w = v.float()\nw += 1",
        "w = v.to(d)\nw[0] -= 1",
    ],
)
def test_the_search_finds_it(line):
    assert overwritten(ast.parse(f"def f(v):\n    {line.replace(chr(10), chr(10) + '    ')}")) != []


def test_no_in_place_operation_follows_a_conversion_that_may_be_none():
    files = Path(fedlora_mpi.__file__).parent.rglob("*.py")
    assert {
        str(file): lines for file in files if (lines := overwritten(ast.parse(file.read_text())))
    } == {}
