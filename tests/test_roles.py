"""Which part of a network is its head and which weights are matrices, found by what the network
does; and said so.
"""

from dataclasses import replace

import odd_networks
import pytest
import torch
from odd_networks import CLASSES, SHAPE
from runs import TINY
from tiers import thorough_param
from torch import nn

from fedlora_mpi.algorithm import LocalTraining
from fedlora_mpi.algorithms.fedit import FedIT
from fedlora_mpi.algorithms.fedlora import FedLoRA
from fedlora_mpi.algorithms.fedper import FedPer
from fedlora_mpi.algorithms.lg_fedavg import LGFedAvg
from fedlora_mpi.algorithms.moon import MOON
from fedlora_mpi.cli import main
from fedlora_mpi.components.lowrank import LowRank, as_weight, matrix_shape, skipped_weights
from fedlora_mpi.core.names import factor_name, factors_by_weight
from fedlora_mpi.core.seeds import isolate_rng, rng
from fedlora_mpi.models.network import Leaf, from_module
from fedlora_mpi.models.zoo import build


def model(name):
    with isolate_rng(1, "test"):
        return from_module(getattr(odd_networks, name)(CLASSES, SHAPE), CLASSES, SHAPE)


def heads(network):
    return {n for n, leaf in network.leaves.items() if leaf.role == "head"}


def images(number=3):
    return torch.randn(number, *SHAPE, generator=rng(1, "test"))


FC = {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    "name, head, leaves",
    [
        ("Net", "fc", FC),
        ("Functional", "fc", FC),
        ("Wrapped", "net.1.fc", {f"net.1.{n}" for n in FC}),
        ("Thrown", "fc", FC),
        ("TrainedAlone", "fc", FC),
        ("Parallel", "fc", FC | {"other.weight", "other.bias"}),
        ("Gated", "fc", FC),
        ("Steps", "fc", FC),
        ("Raw", "", {"w", "b"}),
        ("Own", "fc", {"fc.kernel", "fc.offset"}),
        ("Cosine", "fc", FC),
        (
            "Normed",
            "fc",
            {
                "fc.bias",
                "fc.parametrizations.weight.original0",
                "fc.parametrizations.weight.original1",
            },
        ),
        ("Squeezed", "last", {"last.weight", "last.bias"}),
        ("Logs", "fc", FC),
        ("Sounds", "fc", FC),
        ("Volumes", "fc", FC),
    ],
)
def test_the_head_is_what_makes_the_logits(name, head, leaves):
    network = model(name)
    assert (network.head, heads(network)) == (head, leaves)


@pytest.mark.parametrize(
    "name", ["cnn", "resnet8", "torchvision:squeezenet1_1", "torchvision:mobilenet_v3_small"]
)
def test_an_ordinary_network_has_the_head_that_is_registered_last(name):
    network = build(name, {}, CLASSES, (3, 32, 32), 1)
    kind = nn.Conv2d if "squeeze" in name else nn.Linear
    last = [n for n, part in network.modules[False].named_modules() if isinstance(part, kind)][-1]
    assert network.head == last and heads(network) == {f"{last}.weight", f"{last}.bias"}


ENDS = ("Net", "Wrapped", "Thrown", "TrainedAlone")


@pytest.mark.parametrize("name", ENDS)
def test_features_and_head_are_the_network(name):
    network = model(name)
    quiet, x = network.eval_mode(), images()
    body = {n: v for n, v in network.initial.items() if network.role(n) != "head"}
    z = quiet.features(body, x)
    assert z.shape == (3, 6) and network.ends_in_linear
    assert torch.equal(quiet.classify(network.initial, z), quiet(network.initial, x))


@pytest.mark.parametrize(
    "name",
    ["Functional", "Parallel", "Gated", "Raw", "Own", "Cosine", "Normed", "Squeezed", "Logs"],
)
def test_a_method_that_needs_features_refuses_a_network_that_does_not_end_in_a_linear(name):
    network = model(name)
    assert not network.ends_in_linear
    with pytest.raises(ValueError, match="name = moon: needs a network that ends in a Linear"):
        MOON().check(network, LocalTraining())


def test_fedper_keeps_a_classifier_that_is_registered_first():
    shared, personal = FedPer().init(model("Net"), rng(1))[:2]
    assert personal.keys() == FC and shared.keys() == {"hidden.weight", "hidden.bias"}


def test_a_head_of_several_layers_is_not_shared_as_one():
    assert set(FedPer().init(model("Parallel"), rng(1)).personal) == heads(model("Parallel"))
    with pytest.raises(ValueError, match="a head, which is one layer"):
        LGFedAvg().check(model("Parallel"), LocalTraining())


def test_a_pass_that_forbids_gradients_leaves_the_order_of_registration():
    class Forbids(odd_networks.Net):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    assert from_module(Forbids(CLASSES, SHAPE), CLASSES, SHAPE).head == "hidden"


# Matrices

MATRICES = {
    "Sounds": {
        "conv.weight": ("conv", (6, 8 * 3)),
        "up.weight": ("transposed", (4 * 2, 6)),
        "lstm.weight_ih_l0": ("linear", (12, 4)),
        "lstm.weight_hh_l0": ("linear", (12, 2)),
        "lstm.weight_hr_l0": ("linear", (2, 3)),
        "lstm.weight_ih_l0_reverse": ("linear", (12, 4)),
        "lstm.weight_hh_l0_reverse": ("linear", (12, 2)),
        "lstm.weight_hr_l0_reverse": ("linear", (2, 3)),
        "gru.weight_ih_l0": ("linear", (9, 4)),
        "gru.weight_hh_l0": ("linear", (9, 3)),
        "cell.weight_ih": ("linear", (3, 3)),
        "cell.weight_hh": ("linear", (3, 3)),
        "fc.weight": ("linear", (4, 3)),
    },
    "Volumes": {
        "deep.weight": ("conv", (4 * 3, 3 * 2)),
        "up3.weight": ("transposed", (2 * 2 * 2, 4 * 2)),
        "up2.weight": ("transposed", (4 * 2, 6 * 2)),
        "groups.weight": ("conv", (4 * 3, 4 * 3)),
        "depth.weight": ("conv", (4 * 3, 3)),
        "attend.q_proj_weight": ("linear", (4, 4)),
        "attend.k_proj_weight": ("linear", (4, 3)),
        "attend.v_proj_weight": ("linear", (4, 5)),
        "attend.out_proj.weight": ("linear", (4, 4)),
        "pairs.weight": ("linear", (5, 12)),
        "fc.weight": ("linear", (4, 10)),
    },
    "Raw": {"w": ("linear", (6, 4)), "hidden": ("linear", (64, 6))},
    "Own": {"fc.kernel": ("linear", (6, 4)), "hidden.weight": ("linear", (6, 64))},
}


@pytest.mark.parametrize("name", MATRICES)
def test_every_weight_of_a_product_is_a_matrix(name):
    network = model(name)
    found = {
        n: (leaf.matrix, matrix_shape(leaf)) for n, leaf in network.leaves.items() if leaf.matrix
    }
    assert found == MATRICES[name]
    for n, (_, (high, wide)) in found.items():
        assert high * wide == network.initial[n].numel()


@pytest.mark.parametrize("name", MATRICES)
def test_a_part_of_full_rank_is_any_matrix(name):
    network, how = model(name), LowRank(conv_rank=1, linear_rank=1)
    for n, r in how.ranks(network).items():
        leaf, W = network.leaves[n], torch.randn(network.leaves[n].shape, generator=rng(1, n))
        assert r == min(matrix_shape(leaf)), n
        U, s, V = torch.linalg.svd(_matrix(W, leaf).double(), full_matrices=False)
        factors = {factor_name(n, "A"): V[:r].float(), factor_name(n, "B"): (U * s)[:, :r].float()}
        assert torch.allclose(how.tau(network, factors)[n], W, atol=1e-5), n


def _matrix(W, leaf):
    """The matrix whose ``as_weight`` is W."""
    high, wide = matrix_shape(leaf)
    return W.reshape(wide, high).mT if leaf.matrix == "transposed" else W.reshape(high, wide)


def test_a_transposed_convolution_exchanges_in_and_out():
    leaf, W = Leaf((3, 5, 2, 2), "body", "transposed"), torch.randn(3, 5, 2, 2, generator=rng(1))
    M = W.reshape(6, 10).mT  # [O K2, I K1]
    assert matrix_shape(leaf) == (10, 6) and torch.equal(as_weight(M, leaf), W)


@pytest.mark.parametrize(
    "shape, kind, rank",
    [
        ((8, 3, 5), "conv", 5),  # 0.6 * 8 of [8, 15]
        ((8, 1, 5), "conv", 3),  # depthwise: [8, 5]
        ((4, 2, 3, 3, 3), "conv", 7),  # [12, 18]
        ((6, 4, 2, 2), "transposed", 5),  # [8, 12]
        ((8, 8, 3, 1), "conv", 8),  # 0.6 * 8 * 3 is more than [24, 8] has
        ((8, 1, 3, 3), "conv", 2),  # as before: 0.6 * 1 * 3
        ((28, 5), "linear", 3),
    ],
)
def test_a_rank_is_a_share_of_the_smaller_side_and_never_more_than_it(shape, kind, rank):
    assert LowRank()._rank(Leaf(shape, "body", kind)) == rank


@pytest.mark.parametrize("name", ["Sounds", "Volumes", "Raw", "Own"])
@pytest.mark.parametrize("official", [False, True])
def test_every_factor_has_a_gradient(name, official):
    network = model(name)
    how = (
        LowRank(conv_rank=0.5, linear_rank=2, rank_rule="official", scale="official")
        if official
        else LowRank()
    )
    factors = how.factors(network, rng(1))
    factors = {
        n: torch.randn(v.shape, generator=rng(1, n)).requires_grad_() for n, v in factors.items()
    }
    tau = how.tau(network, factors)
    theta = network.initial | {n: network.initial[n] + 0.3 * t for n, t in tau.items()}
    loss = (network(theta, images(5)) * torch.randn(5, CLASSES, generator=rng(2))).sum()
    for n, gradient in zip(factors, torch.autograd.grad(loss, list(factors.values())), strict=True):
        assert gradient.abs().max() > 0, n


@pytest.mark.parametrize("algorithm", ["fedlora", thorough_param("{name: fedit, full: []}")])
@pytest.mark.parametrize("name", ["Sounds", thorough_param("Volumes")])
def test_every_decomposed_weight_moves_in_a_run(name, algorithm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    which = (f"algorithm={algorithm}", f"model=odd_networks:{name}")
    assert main(["run", str(TINY), "rounds=1", "participation=1", *SLOW, *which]) == 0
    from fedlora_mpi import open_run

    before = model(name)
    done = open_run(tmp_path / "run").client(0).variables
    factors = factors_by_weight(done.shared | done.personal, "B")
    assert set(factors) == set(MATRICES[name]) == set(LowRank().ranks(before))
    assert all(v.any() for v in factors.values())


SLOW = ("engine.path=loop", "train.lr=0.01")


# What is said


def said(capsys, *given):
    assert main(["plan", str(TINY), *SLOW, *given]) == 0
    return [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]


def test_a_plan_shows_roles_and_ranks(capsys, unmeasured):
    lines = said(capsys, "model=odd_networks:Volumes")
    shown = dict(line for line in lines if len(line) == 2)
    assert (
        "deep" in shown["body"]
        and shown["head"] == "44 numbers in fc"
        and shown["norm"] == "20 numbers in norm"
    )
    assert (
        "deep.weight 4 of 12x6" in shown["low-rank"]
        and "attend.k_proj_weight 2 of 4x3" in shown["low-rank"]
    )
    assert shown["no"] == (
        "rank    3 weights: table.weight (an embedding, a table of rows), norm.weight (of a "
        "normalisation layer), norm.bias (of a normalisation layer)"
    )


def test_a_plan_of_any_method_shows_roles(capsys, unmeasured):
    lines = dict(
        line
        for line in said(capsys, "model=odd_networks:Net", "algorithm=fedper")
        if len(line) == 2
    )
    assert (
        lines["head"] == "28 numbers in fc"
        and lines["body"] == "390 numbers in hidden"
        and "low-rank" not in lines
    )


@pytest.mark.parametrize(
    "name, algorithm, hint",
    [
        (
            "odd_networks:Volumes",
            "fedlora",
            "fedlora decomposes 11 of 14 weights; not decomposed: table.weight (an",
        ),
        (
            "odd_networks:Volumes",
            "{name: fedit, full: [head, norm]}",
            "fedit decomposes 10 of 11 weights; not dec",
        ),
        thorough_param("odd_networks:Sounds", "fedlora", ""),
        ("odd_networks:Volumes", "fedavg", ""),
        ("odd_networks:Volumes", "{name: fedlora, layers: ['deep.*', 'fc.*']}", ""),
        thorough_param("{name: cnn, width: 4, hidden: 8}", "{name: fedit, lora_ranks: [2]}", ""),
    ],
)
def test_a_run_says_once_what_its_low_rank_parts_leave_out(
    name, algorithm, hint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    which = (f"algorithm={algorithm}", f"model={name}")
    assert main(["run", str(TINY), "rounds=1", "train.epochs=2", *which, *SLOW]) == 0
    hints = [line for line in capsys.readouterr().err.splitlines() if "decompose" in line]
    assert len(hints) == bool(hint) and all(line.startswith(f"hint: {hint}") for line in hints)


def test_a_pattern_of_what_is_no_matrix_is_refused_with_the_reason():
    text = r"layers = table.\*: matches no weight that can be decomposed .table.weight: an embedding.*there are deep"
    with pytest.raises(ValueError, match=text):
        FedLoRA(layers=("table.*",)).check(model("Volumes"), LocalTraining())
    with pytest.raises(
        ValueError,
        match=r"layers = fc.b\*: matches no weight that can be decomposed .fc.bias: a vector",
    ):
        FedIT(layers=("fc.b*",)).check(model("Volumes"), LocalTraining())


def test_what_is_left_out_has_a_reason():
    network = model("Normed")
    names = ("fc.parametrizations.weight.original0", "fc.parametrizations.weight.original1")
    whole = dict.fromkeys(
        (*names, "hidden.parametrizations.weight.original"), "what a layer computes its weight from"
    )
    assert skipped_weights(network, {}) == whole
    assert skipped_weights(network, {}, ("head",))[names[1]] == "trained in full"
    raw = model("Raw")
    assert skipped_weights(raw, {"w": 2})["hidden"] == "not in layers"
    assert skipped_weights(raw, LowRank().ranks(raw)) == {"shift": "one row"}
    assert replace(raw).why_no_matrix("w") == ""
