"""LoRA on slices of a weight that holds several matrices, such as q and v of torch's attention."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from runs import TINY, assert_same_run, run_rounds, snapshots_equal
from tiers import thorough_param
from torch import nn
from torch.func import grad

from fedlora_mpi import algorithms
from fedlora_mpi.algorithm import Variables, low_rank_of
from fedlora_mpi.algorithms.fedit import FedIT
from fedlora_mpi.algorithms.fedlora import FedLoRA
from fedlora_mpi.analysis.run_view import open_run
from fedlora_mpi.cli import main
from fedlora_mpi.components.lora import FineTuning
from fedlora_mpi.components.lowrank import as_updates, skipped_weights
from fedlora_mpi.core.names import is_factor
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.vision import import_torchvision
from fedlora_mpi.models import zoo
from fedlora_mpi.models.network import from_module
from fedlora_mpi.plan.roles import leaf_lines

WIDTH, CLASSES, SHAPE = 12, 4, (3, 8, 8)
QV = ("*.in_proj_weight:q", "*.in_proj_weight:v")
TINY_VIT = "model={name: vit, patch: 4, width: 8, heads: 2, layers: 1, feedforward: 12}"
TINY_QV = 'algorithm.layers=["*.in_proj_weight:q", "*.in_proj_weight:v"]'
TINY_RANKS = "algorithm.lora_ranks=[3,1,2]"
WEIGHT = "blocks.0.attention.in_proj_weight"
LORA_METHODS = sorted(
    name
    for name in algorithms.algorithm_names()
    if issubclass(algorithms.find_algorithm(name), FineTuning)
)


def numbers(*shape, address=0):
    return torch.randn(*shape, generator=rng(1, "slices", *shape, address))


def torchvision_vit():
    """A tiny VisionTransformer of torchvision."""
    return import_torchvision().models.VisionTransformer(
        8, 4, 2, 2, WIDTH, 20, num_classes=CLASSES, norm_layer=partial(nn.LayerNorm, eps=1e-5)
    )


@pytest.fixture(scope="module")
def model():
    network = torchvision_vit()
    with torch.no_grad():
        for n, p in network.named_parameters():  # its head starts at zero
            p.copy_(0.3 * numbers(*p.shape, address=n))
    return from_module(network, CLASSES, SHAPE)


def factors_of(method, model):
    """The method's variables with any numbers in the factors."""

    def fill(tree):
        return {n: numbers(*w.shape, address=n) if is_factor(n) else w for n, w in tree.items()}

    return Variables(*map(fill, method.init(model, rng(1, "init"))[:2]))


# The slices


def test_attention_of_torch_holds_three_matrices(model):
    fused = {n: (f.matrices, f.axis) for n, f in model.fused.items()}
    names = [f"encoder.layers.encoder_layer_{k}.self_attention.in_proj_weight" for k in (0, 1)]
    assert fused == dict.fromkeys(names, (("q", "k", "v"), 0))
    assert {n: leaf.shape for n, leaf in model.slices(names[1]).items()} == {
        f"{names[1]}:{matrix}": (WIDTH, WIDTH) for matrix in "qkv"
    }
    assert model.slices(names[0].replace("in_proj_weight", "out_proj.weight")) == {}
    assert model.leaf(names[0]) == model.leaves[names[0]]


def test_inputs_of_different_sizes_are_weights_of_their_own():
    attention = nn.MultiheadAttention(6, 2, kdim=5, vdim=4, batch_first=True)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = attention, nn.Linear(6, 3)

        def forward(self, x):
            x = x.flatten(2)
            return self.head(self.attention(x, x[..., :5], x[..., :4])[0].mean(1))

    net = from_module(Net(), 3, (4, 2, 3))
    assert net.fused == {} and "attention.q_proj_weight" in FedIT().adapted_shapes(net)


def test_each_slice_has_factors_of_its_own(model):
    method = FedIT(layers=("*_1.*.in_proj_weight:[qv]",), lora_ranks=(5,))
    name = "encoder.layers.encoder_layer_1.self_attention.in_proj_weight"
    v = method.init(model, rng(1, "init"))
    assert {n: [*w.shape] for n, w in v.shared.items() if ".." in n} == {
        f"{name}:{matrix}..{letter}": [5, WIDTH] if letter == "A" else [WIDTH, 5]
        for matrix in "qv"
        for letter in "AB"
    }


def test_a_pattern_without_a_colon_matches_no_slice(model):
    shapes = FedIT().adapted_shapes(model)
    assert not any(":" in n for n in shapes)
    assert sum(sides == (3 * WIDTH, WIDTH) for sides in shapes.values()) == 2


# The network


def projected(x, W, b, A, B, s):
    """x W' + b + s (x A') B', the low-rank part apart."""
    return F.linear(x, W, b) + s * F.linear(F.linear(x, A), B)


def attention_by_hand(layer, x, factors, s):
    """Self-attention of x [N, T, d] whose q and v have the low-rank parts ``factors``."""
    Ws, bs = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    none = torch.zeros(1, WIDTH), torch.zeros(WIDTH, 1)
    q, k, v = (
        projected(x, W, b, *factors.get(name, none), s).unflatten(2, (layer.num_heads, -1))
        for name, W, b in zip("qkv", Ws, bs, strict=True)
    )
    scores = torch.einsum("nthe,nshe->nhts", q, k) / (WIDTH / layer.num_heads) ** 0.5
    z = torch.einsum("nhts,nshe->nthe", scores.softmax(-1), v).flatten(2)
    return layer.out_proj(z)


@pytest.mark.parametrize("merge", [True, False])
def test_lora_on_q_and_v_of_torchvision_is_the_sliced_computation(model, merge):
    method = FedIT(layers=QV, lora_ranks=(3,), alpha=1.5, merge=merge)
    v = factors_of(method, model)
    theirs = torchvision_vit().eval()
    theirs.load_state_dict(model.initial)
    for number, block in enumerate(theirs.encoder.layers):
        name = f"encoder.layers.encoder_layer_{number}.self_attention.in_proj_weight"
        pairs = {m: (v.shared[f"{name}:{m}..A"], v.shared[f"{name}:{m}..B"]) for m in "qv"}
        layer = block.self_attention
        layer.forward = lambda x, *_, layer=layer, pairs=pairs, **__: (
            attention_by_hand(layer, x, pairs, method.s),
            None,
        )
    x = numbers(5, *SHAPE)
    ours = method.logits(model.eval_mode(), v, x)
    with torch.no_grad():
        without = model.eval_mode()(model.initial, x)
        assert not torch.allclose(without, theirs(x), atol=0.1)
        torch.testing.assert_close(ours, theirs(x), rtol=1e-6, atol=1e-6)


def test_other_rows_are_those_of_the_network_to_the_bit(model):
    method = FedIT(layers=QV, lora_ranks=(3,))
    v = factors_of(method, model)
    tree = method.client_model(model, v)
    for name in model.fused:
        q, k, v_rows = tree[name].chunk(3)
        W_q, W_k, W_v = model.initial[name].chunk(3)
        assert torch.equal(k, W_k)
        for rows, W, matrix in ((q, W_q, "q"), (v_rows, W_v, "v")):
            A, B = (v.shared[f"{name}:{matrix}..{letter}"] for letter in "AB")
            torch.testing.assert_close(rows, W + method.s * B @ A)


def test_gradients_are_those_of_the_slices_alone(model):
    """With G = dL/dW of the rows of a slice: dL/dA = s B' G and dL/dB = s G A'."""
    method = FedIT(layers=QV, lora_ranks=(3,), alpha=1.5)
    v, x, y = factors_of(method, model), numbers(5, *SHAPE), torch.tensor([0, 1, 2, 3, 0])

    def loss_of_weights(tree):
        return F.cross_entropy(model(tree, x), y)

    def loss_of_factors(shared):
        return F.cross_entropy(method.logits(model, v._replace(shared=shared), x), y)

    G, g = grad(loss_of_weights)(method.client_model(model, v)), grad(loss_of_factors)(v.shared)
    for name in model.fused:
        for rows, matrix in zip(G[name].chunk(3), "qkv", strict=True):
            if matrix != "k":
                A, B = (v.shared[f"{name}:{matrix}..{letter}"] for letter in "AB")
                torch.testing.assert_close(g[f"{name}:{matrix}..A"], method.s * B.T @ rows)
                torch.testing.assert_close(g[f"{name}:{matrix}..B"], method.s * rows @ A.T)


def test_updates_of_all_slices_are_the_update_of_the_weight(model):
    name = next(iter(model.fused))
    whole = numbers(3 * WIDTH, WIDTH)
    parts = {f"{name}:{m}": rows for m, rows in zip("qkv", whole.chunk(3), strict=True)}
    for order in ("qkv", "vkq"):
        updates = as_updates({f"{name}:{m}": parts[f"{name}:{m}"] for m in order}, model)
        assert updates.keys() == {name} and torch.equal(updates[name], whole)


def test_fedlora_decomposes_slices_too(model):
    method = FedLoRA(layers=QV, linear_rank=0.25)
    assert set(method.ranks(model).values()) == {3} and len(method.ranks(model)) == 4
    v = factors_of(method, model)
    tau = method.tau(model, v.shared | v.personal)
    assert tau.keys() == model.fused.keys()
    assert all(not t.chunk(3)[1].any() and t.chunk(3)[2].any() for t in tau.values())


def test_gpt2_of_transformers_holds_them_in_columns():
    import_torchvision()  # see there: transformers imports it
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=6, n_embd=WIDTH, n_layer=1, n_head=2, num_labels=3, pad_token_id=0
    )
    torch.manual_seed(1)
    config._attn_implementation = "eager"
    net = from_module(GPT2(transformers, config), 9, (6,), 9, positions=6)
    method = FedIT(layers=("*.c_attn.weight:[qv]",), lora_ranks=(3,), full=())
    v, name = factors_of(method, net), "model.transformer.h.0.attn.c_attn.weight"
    assert net.fused.keys() == {name}  # and not c_fc [d, 4 d]
    q, k, value = (method.client_model(net, v)[name] - net.initial[name]).split(WIDTH, 1)
    assert not k.any()
    for update, matrix in ((q, "q"), (value, "v")):
        A, B = (v.shared[f"{name}:{matrix}..{letter}"] for letter in "AB")
        torch.testing.assert_close(update.T, method.s * B @ A, rtol=1e-4, atol=1e-5)


class GPT2(nn.Module):
    """A language model of transformers whose output are the logits alone."""

    def __init__(self, transformers, config):
        super().__init__()
        self.model = transformers.GPT2LMHeadModel(config)

    def forward(self, x):
        return self.model(input_ids=x, use_cache=False).logits


# Mistakes


@pytest.mark.parametrize(
    "layers, message",
    [
        (
            ["*.in_proj_weight:w"],
            r"layers = \*.in_proj_weight:w: matches no slice of a weight; there are "
            r"\S+_0.self_attention.in_proj_weight:q, \S+:k, \S+:v, \S+:q, \S+:k and 1 more",
        ),
        (["*.out_proj.weight:q"], r"layers = \*.out_proj.weight:q: matches no slice of a weight.*"),
        (
            ["*", "*_1.*:q"],
            r"layers = \['\*', '\*_1.\*:q'\]: match (\S+_1.self_attention.in_proj_weight) and its "
            r"slice \1:q; name one of them",
        ),
    ],
)
def test_a_slice_that_does_not_exist_is_refused(model, layers, message):
    for method in (FedIT(layers=tuple(layers)), FedLoRA(layers=tuple(layers))):
        with pytest.raises(ValueError, match=f"^{message}$") as error:
            method.check(model, None)
        assert "\n" not in str(error.value)


def test_a_network_without_slices_says_so(call):
    code, _, err = call("run", TINY, "algorithm=fedit", 'algorithm.layers=["*:q"]')
    assert code == 2 and err.count("\n") == 1
    assert "layers = *:q: matches no slice of a weight; there are none" in err


# Runs


TINY_RUN = TINY_VIT, TINY_RANKS, TINY_QV, "rounds=2", "train.epochs=1"


def build_vit():
    """The network of the tiny run."""
    options = {"patch": 4, "width": 8, "heads": 2, "layers": 1, "feedforward": 12}
    return zoo.build("vit", options, 4, (1, 8, 8), 1)


def changed_rows(before, after):
    """Which of q, k and v changed in the attention of the tiny network."""
    pairs = zip("qkv", before.chunk(3), after.chunk(3), strict=True)
    return "".join(n for n, old, new in pairs if not torch.equal(old, new))


@pytest.mark.parametrize(
    "name", [n if n in ("fedhl", "flora") else thorough_param(n) for n in LORA_METHODS]
)
def test_every_lora_method_changes_only_what_is_named(trained, name):
    client = open_run(trained(*TINY_RUN, f"algorithm={name}")).client(0)
    assert {n.partition("..")[0] for n in client.variables.shared if ".." in n} <= {
        f"{WEIGHT}:q",
        f"{WEIGHT}:v",
    }
    after, before = torch.from_numpy(client.weights[WEIGHT]), client.network.initial[WEIGHT]
    assert changed_rows(before, after) == "qv"


def test_a_resume_moves_no_bit(trained, copied):
    how = *TINY_RUN, "algorithm=fedhl"
    cut = copied(*how, "rounds=1")
    assert main(["resume", str(cut), "rounds=2"]) == 0
    assert_same_run(trained(*how), cut)


def test_an_adapter_of_a_slice_is_not_written_for_peft(trained, call):
    folder = trained(*TINY_RUN, "algorithm=fedit")
    code, _, err = call("export", folder, "--client", 0, "--to", "adapter")
    assert code == 2 and f"{WEIGHT}: is no weight of a Linear" in err


def test_plan_names_the_slices():
    method, net = FedIT(layers=QV, lora_ranks=(3,)), build_vit()
    low_rank = low_rank_of(method.init(net, rng(1)))
    assert WEIGHT not in skipped_weights(net, low_rank, ("head",))
    (line,) = [text for _, text in leaf_lines(net, low_rank, ("head",)) if WEIGHT in text]
    assert line.split("  ")[-1].strip() == "rank 3 of 8x8 in q, v"


@pytest.mark.parametrize("algorithm", ["fedhl", thorough_param("fedit"), thorough_param("flora")])
def test_slices_have_the_same_bits_on_one_two_and_three_ranks(algorithm):
    how = TINY_VIT, f"algorithm={algorithm}", TINY_RANKS, TINY_QV, "rounds=2", "train.epochs=1"
    (one,) = run_rounds(*how)
    for ranks in (2, 3):
        for other in run_rounds(*how, ranks=ranks):
            assert all(snapshots_equal(a, b) for a, b in zip(one, other, strict=True))
    assert not snapshots_equal(one[0], one[-1])
