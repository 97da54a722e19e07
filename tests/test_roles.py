"""Which part of a network is its head and which weights are matrices, found by what the network
does; and said so.
"""

from dataclasses import replace
from pathlib import Path

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
from fedlora_mpi.config import read, resolved_dict
from fedlora_mpi.core.names import factor_name, factors_by_weight
from fedlora_mpi.core.seeds import isolate_rng, rng
from fedlora_mpi.models.network import Leaf, from_module
from fedlora_mpi.models.zoo import build
from fedlora_mpi.plan.roles import leaf_lines


def model(name):
    with isolate_rng(1, "test"):
        return from_module(getattr(odd_networks, name)(CLASSES, SHAPE), CLASSES, SHAPE)


def heads(network):
    return {n for n, leaf in network.leaves.items() if leaf.role == "head"}


def images(number=3):
    return torch.randn(number, *SHAPE, generator=rng(1, "test"))


FC = {"fc.weight", "fc.bias"}
CONFIGS = Path(__file__).parent.parent / "configs"


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
    """The title of each line of a plan, and the line after it; rows of the table by their leaf."""
    assert main(["plan", str(TINY), *SLOW, *given]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    return dict((line.split(maxsplit=1) + [""])[:2] for line in lines)


def test_a_plan_shows_a_table_of_roles_and_ranks(capsys, unmeasured):
    shown = said(capsys, "model=odd_networks:Volumes")
    assert shown["head"] == "fc, found by a forward pass"
    assert shown["leaves"].split() == ["leaf", "shape", "role", "low-rank", "part"]
    table = {name: row.split("  ") for name, row in shown.items()}
    cells = {name: [cell.strip() for cell in row if cell] for name, row in table.items()}
    assert cells["deep.weight"] == ["[4, 1, 3, 3, 2]", "body", "rank 4 of 12x6"]
    assert cells["attend.k_proj_weight"] == ["[4, 3]", "body", "rank 2 of 4x3"]
    assert cells["fc.bias"] == ["[4]", "head", "no"]
    assert cells["table.weight"] == ["[3, 4]", "body", "no: an embedding, a table of rows"]
    assert cells["norm.weight"] == ["[2, 5]", "norm", "no: of a normalisation layer"]
    assert model("Volumes").leaves.keys() <= shown.keys()


def test_a_plan_of_any_method_shows_roles(capsys, unmeasured):
    shown = said(capsys, "model=odd_networks:Net", "algorithm=fedper")
    assert shown["leaves"].split() == ["leaf", "shape", "role"]
    assert shown["fc.weight"].split() == ["[4,", "6]", "head"]
    assert shown["hidden.weight"].split() == ["[6,", "64]", "body"]


def test_leaves_that_differ_in_the_numbers_of_layers_share_a_row():
    network = build("transformer", {"layers": 3}, CLASSES, (12,), 1, tokens=30)
    rows = [line for _, line in leaf_lines(network, LowRank().ranks(network), ())]
    assert len(rows) < 25 < len(network.leaves)
    (attention,) = [row for row in rows if row.startswith("blocks.*.attention.in_proj_weight")]
    assert "(3 leaves)" in attention and attention.endswith("body  rank 38 of 192x64")
    wide = build("resnet10", {}, CLASSES, (3, 32, 32), 1)
    (norm,) = [line for _, line in leaf_lines(wide, {}, ()) if line.startswith("layers.*.bn1.weig")]
    assert "(4 leaves)" in norm and norm.split()[-4:] == ["[64]", "to", "[512]", "norm"]


def test_the_table_shows_the_low_rank_part_of_a_frozen_weight():
    module = odd_networks.Net(CLASSES, SHAPE)
    module.hidden.requires_grad_(False)
    network = from_module(module, CLASSES, SHAPE)
    rows = [line.split("  ") for _, line in leaf_lines(network, {"hidden.weight": 3}, ("head",))]
    cells = {row[0]: [cell.strip() for cell in row[1:] if cell] for row in rows}
    assert cells["hidden.weight"] == ["[6, 64]", "body, frozen", "rank 3 of 6x64"]


# What the config names


def named(name, **keys):
    return build(f"odd_networks:{name}", {}, CLASSES, SHAPE, 1, **keys)


@pytest.mark.parametrize(
    "name, head, features",
    [
        ("Net", "hidden", False),
        ("Net", "fc", True),
        ("Parallel", "other", False),
        ("Calibrated", "fc", False),
        ("Deep", "end", False),
        ("Deep", "end.2", True),
    ],
)
def test_the_config_may_name_the_head(name, head, features):
    network = named(name, head=head)
    expected = {n for n in network.leaves if n.startswith(f"{head}.")}
    assert (network.head, heads(network)) == (head, expected) and expected
    assert network.ends_in_linear == features
    assert FedPer().init(network, rng(1)).personal.keys() == expected


def test_a_layer_that_rescales_the_logits_is_the_head_unless_another_is_named():
    assert named("Calibrated").head == "scale"


@pytest.mark.parametrize(
    "name, head, text",
    [
        ("Thrown", "dead", "head = dead: does not enter the logits; without the key it is fc"),
        ("Thrown", "auxiliary", "head = auxiliary: does not enter the logits"),
        ("Net", "hiden", "no module with parameters; there are fc, hidden. Did you mean hidden.$"),
        ("Wrapped", "net.0", "no module with parameters; there are net, net.1, net.1.fc, net.1.h"),
        ("Shared", "fc", "head = fc: all its parameters are those of other layers too"),
    ],
)
def test_a_head_that_is_none_is_refused(name, head, text):
    with pytest.raises(ValueError, match=text):
        named(name, head=head)


def test_a_named_head_may_lie_in_a_pass_that_forbids_gradients():
    class Forbids(odd_networks.Net):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    network = from_module(Forbids(CLASSES, SHAPE), CLASSES, SHAPE, head="fc")
    assert heads(network) == FC


def test_a_users_linear_that_calls_the_function_is_the_head():
    assert model("Called").head == "fc" and heads(model("Called")) == {"fc.kernel", "fc.offset"}


def test_a_run_trains_with_a_named_head_and_names_a_wrong_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    which = ("rounds=1", "algorithm=fedper", "model=odd_networks:Deep", *SLOW)
    assert main(["run", str(TINY), *which, "model.head=end"]) == 0
    from fedlora_mpi import open_run

    personal = open_run(tmp_path / "run").client(0).variables.personal
    assert personal.keys() == {f"end.{n}.{m}" for n in (0, 2) for m in ("weight", "bias")}
    assert "\n  head: end\n" in (tmp_path / "run/config.yaml").read_text()
    assert main(["run", str(TINY), *which, "model.head=no", "output=no"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "tiny.yaml: model.head = no: is no module with parameters; there are" in line
    assert not (tmp_path / "no").exists()


HEADS = {
    "resnet8": "fc",
    "cifar_resnet8": "fc",
    "cnn": "9",
    **{f"cnn{number}": "11" for number in range(1, 6)},
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_a_network_of_the_package_is_what_naming_it_gives(name):
    found, asked = (
        build(name, {}, CLASSES, (3, 32, 32), 1, head=head) for head in (None, HEADS[name])
    )
    assert found.head == HEADS[name] and found.all_leaves == asked.all_leaves
    assert heads(found) == {f"{found.head}.weight", f"{found.head}.bias"} and found.output is None


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_that_names_no_head_is_recorded_as_before(path):
    block = resolved_dict(read(path))["model"]
    for network in block.get("mix", [block]):
        assert not {"head", "output"} & network.keys()


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
