"""Weights W_0 + W + s B A that are never formed, and methods that train with them."""

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from methods import overrides_for
from runs import assert_near, run_rounds, snapshots_equal
from small import make_model
from tiers import tiered_param
from torch.func import functional_call, vmap

from fedlora_mpi.algorithms import algorithm_names, find_algorithm
from fedlora_mpi.components.lora import FineTuning
from fedlora_mpi.config.blocks import to_plain
from fedlora_mpi.config.former import restore_former_block
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.models.unmerged import UnmergedWeight

OUT, IN, RANK, SCALE = 6, 4, 2, 0.5
FAMILY = sorted(n for n in algorithm_names() if issubclass(find_algorithm(n), FineTuning))


def numbers(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(1, "unmerged", *shape), dtype=torch.float64).to(dtype)


def parts(with_dense, *clients):
    dense = numbers(*clients, OUT, IN) / 3 if with_dense else None
    return dense, numbers(*clients, RANK, IN), numbers(*clients, OUT, RANK)


def merged(base, dense, A, B):
    return base + SCALE * B @ A + (0 if dense is None else dense)


FUNCTIONS = {
    "linear": lambda w: F.linear(numbers(3, IN), w, numbers(OUT)),
    "linear of a sequence": lambda w: F.linear(numbers(3, 5, IN), w),
    "addmm": lambda w: torch.addmm(numbers(IN), numbers(3, OUT), w, beta=2.0, alpha=3.0),
    "matmul": lambda w: numbers(3, OUT) @ w,
    "transposed": lambda w: numbers(3, IN) @ w.T,
    "rows": lambda w: w[1:3],
    "weight as the input": lambda w: F.linear(w, numbers(7, IN)),
    "both": lambda w: F.linear(w, w),
    "doubled": lambda w: 2 * w,
}


@pytest.mark.parametrize("input_first", [False, True])
@pytest.mark.parametrize("with_dense", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_function_gives_what_the_sum_gives_and_its_gradients(name, with_dense, input_first):
    base, (dense, A, B) = numbers(OUT, IN), parts(with_dense)
    if input_first:  # the same stored weight, whose inputs are on the other side
        dense, A, B = None if dense is None else dense.mT, B.mT.clone(), A.mT.clone()
    A.requires_grad_(), B.requires_grad_()
    update = merged(0, dense, A, B)
    whole = base + (update.mT if input_first else update)
    results = [
        FUNCTIONS[name](UnmergedWeight(base, dense, A, B, SCALE, input_first)),
        FUNCTIONS[name](whole),
    ]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert type(results[0]) is torch.Tensor
    gradients = [torch.autograd.grad(result.square().sum(), (A, B)) for result in results]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_it_describes_itself_without_a_sum(monkeypatch):
    monkeypatch.setattr(UnmergedWeight, "form", lambda self: pytest.fail("was formed"))
    weight = UnmergedWeight(numbers(OUT, IN), *parts(False), SCALE)
    assert weight.shape == (OUT, IN) and weight.dim() == 2 and weight.numel() == OUT * IN
    assert weight.dtype == torch.float64 and weight.device.type == "cpu"


@pytest.mark.parametrize("with_dense", [False, True])
def test_clients_of_a_stack_have_one_base(with_dense):
    layer, base, x = torch.nn.Linear(IN, OUT).double(), numbers(OUT, IN), numbers(5, 3, IN)
    dense, A, B = parts(with_dense, 5)

    def forward(dense, A, B, x):
        weight = UnmergedWeight(base, dense, A, B, SCALE)
        return functional_call(layer, {"weight": weight}, (x,))

    axes = (0 if with_dense else None), 0, 0, 0
    found = vmap(forward, in_dims=axes)(dense, A, B, x)
    weights = merged(base, dense, A, B)
    expected = torch.stack(
        [F.linear(row, w, layer.bias) for row, w in zip(x, weights, strict=True)]
    )
    torch.testing.assert_close(found, expected)


def test_a_half_base_stays_half_beside_whole_factors():
    base, (_, A, B) = numbers(OUT, IN, dtype=torch.bfloat16), parts(False)
    A, B = A.float().requires_grad_(), B.float().requires_grad_()
    weight = UnmergedWeight(base, None, A, B, SCALE)
    y = F.linear(numbers(3, IN, dtype=torch.bfloat16), weight)
    assert y.dtype == torch.bfloat16 and weight.form().dtype == torch.bfloat16
    assert {g.dtype for g in torch.autograd.grad(y.sum(), (A, B))} == {torch.float32}


def test_training_keeps_no_tensor_of_the_size_of_a_weight():
    """With ``merge`` there is one, which shows that the test would find it."""
    model = make_model("mlp")
    sizes = [{leaf.shape for leaf in model.leaves.values() if len(leaf.shape) == 2}]
    for merge in (True, False):
        method = find_algorithm("fedit")(lora_ranks=(2,), full=(), merge=merge)
        v = method.init(model, rng(1, "init"))
        v = v._replace(shared={n: w.requires_grad_() for n, w in v.shared.items()})
        own = {w.untyped_storage().data_ptr() for w in model.initial.values()}
        kept = []

        def keep(tensor, own=own, kept=kept):
            if tensor.untyped_storage().data_ptr() not in own:
                kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            method.logits(model, v, model.zero_inputs(7) + 1)
        found = {shape for shape in kept if shape in sizes[0] or shape[::-1] in sizes[0]}
        assert bool(found) == merge, kept


def test_the_family_is_whole():
    assert len(FAMILY) >= 12
    assert all("merge" in {f.name for f in fields(find_algorithm(name))} for name in FAMILY)


@pytest.mark.parametrize(
    "name", [tiered_param(n, id=n, thorough=n not in ("fedit", "fedhl")) for n in FAMILY]
)
@pytest.mark.parametrize(
    "path",
    [
        tiered_param("stack", id="stack", thorough=False),
        tiered_param("loop", id="loop", thorough=True),
    ],
)
def test_methods_learn_alike_with_weights_that_are_not_formed(name, path):
    common = (
        *overrides_for(name),
        "model={name: mlp, hidden: 8}",
        "algorithm.lora_ranks=[3,1,2]",
        "algorithm.alpha=3",
        "engine.group_size=1" if path == "loop" else "engine.group_size=2",
        f"engine.path={path}",
        "rounds=2",
    )
    ((*_, with_sum),) = run_rounds(*common)
    ((*_, without),) = run_rounds(*common, "algorithm.merge=false")
    assert_near(with_sum.shared, without.shared, 1e-3)
    assert_near(with_sum.personal, without.personal, 1e-3)
    assert not snapshots_equal(with_sum, without)  # the key does something


@pytest.mark.parametrize("name", ["fedit", "fedhl"])
def test_ranks_do_not_matter(name):
    settings = (
        *overrides_for(name),
        "model={name: mlp, hidden: 8}",
        "algorithm.lora_ranks=[3,1,2]",
        "algorithm.alpha=3",
        "algorithm.merge=false",
        "engine.group_size=2",
        "rounds=2",
    )
    ((*_, whole),) = run_rounds(*settings)
    for ranks in (2, 3):
        for moments in run_rounds(*settings, ranks=ranks):
            assert snapshots_equal(whole, moments[-1])


@pytest.mark.parametrize("name", FAMILY)
def test_the_key_leaves_the_digests_of_former_configs_alone(name):
    block = {"name": name} | to_plain(find_algorithm(name)())
    assert block["merge"] is True and "merge" not in restore_former_block(block)
    assert "merge" in restore_former_block(block | {"merge": False})
