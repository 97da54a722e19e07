"""Frozen weights in 4 bits: ``model.quantization``."""

import math
import sys
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from causal import small_model
from methods import overrides_for
from runs import TINY, assert_same_run, build_tiny, create_run, run_rounds, snapshots_equal
from tiers import thorough_param, tiered_param
from torch import nn
from torch.func import functional_call, vmap

import fedlora_mpi
from fedlora_mpi.algorithms import algorithm_names, find_algorithm
from fedlora_mpi.cli import main
from fedlora_mpi.components.lora import FineTuning
from fedlora_mpi.config.blocks import ConfigError
from fedlora_mpi.core.names import is_factor, weight_of
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import nbytes
from fedlora_mpi.experiment.fingerprint import tensor_digest
from fedlora_mpi.experiment.loop import resume
from fedlora_mpi.models import zoo
from fedlora_mpi.models.quantized import QuantizedWeight, quantize
from fedlora_mpi.models.recomputing import recompute_blocks
from fedlora_mpi.models.unmerged import UnmergedWeight
from fedlora_mpi.models.weights import pack_safetensors
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import Refusal

pytest.importorskip("bitsandbytes")

OUT, IN, LENGTH, TOKENS = 6, 80, 6, 11
SIZES = "name: mlp, hidden: 8, layers: 2"
STORED = f"model={{{SIZES}, quantization: nf4}}"
TUNING = (
    "algorithm=fedit",
    "algorithm.lora_ranks=[3,1,2]",
    "algorithm.alpha=3",
    "rounds=2",
)
UNMERGED = "algorithm.merge=false"
FAMILY = sorted(n for n in algorithm_names() if issubclass(find_algorithm(n), FineTuning))


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=rng(1, "quantized", *shape)).to(dtype)


def gpt(quantization=None, dtype=None, **how):
    sizes = {"width": 16, "heads": 2, "layers": 2, "feedforward": 24}
    how |= {"dtype": dtype, "quantization": quantization}
    return zoo.build("gpt", sizes, TOKENS, (LENGTH,), 1, TOKENS, positions=LENGTH, **how)


class Double(nn.Linear):
    """A Linear in float64 between layers in float32."""

    def forward(self, x):
        return super().forward(x.double()).float()


def double(classes, shape):
    first = Double(math.prod(shape), 5, dtype=torch.float64)
    return nn.Sequential(nn.Flatten(), first, nn.Linear(5, classes))


def with_numbers(model, quantized):
    """``model`` with the numbers of the weights of ``quantized`` in their place."""
    values = {n: quantized.constants[n].form() for n in quantized.frozen_leaves}
    return replace(model, initial=model.initial | values)


# --- one weight


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(OUT, IN), (3, 64), (7, 9)], ids=str)
def test_numbers_are_the_nearest_of_sixteen_in_each_block(kind, dtype, shape):
    value = numbers(*shape, dtype=dtype)
    weight = QuantizedWeight.of(value, kind)
    found, blocks = weight.form(), -(-value.numel() // 64)
    assert found.dtype == weight.dtype == dtype and found.shape == weight.shape == value.shape
    assert weight.nbytes == -(-value.numel() // 2) + 4 * blocks == nbytes({"": weight})
    scale = value.flatten().float().split(64)
    for block, numbers_found in zip(scale, found.flatten().float().split(64), strict=True):
        largest = block.abs().max()
        levels = (numbers_found / largest).unique()
        assert len(levels) <= 16 and levels.abs().max() == 1
        # half of the widest gap between two levels, 0.304 (nf4) or 0.333 (fp4) of the largest
        assert (block - numbers_found).abs().max() <= 0.17 * largest


def test_numbers_that_are_levels_stay_as_they_are():
    once = QuantizedWeight.of(numbers(OUT, IN), "nf4")
    again = QuantizedWeight.of(once.form(), "nf4")
    assert torch.equal(once.levels, again.levels) and torch.equal(once.scales, again.scales)


def test_a_weight_with_its_inputs_first_has_the_blocks_of_its_transpose():
    value = numbers(OUT, IN)
    straight, turned = (QuantizedWeight.of(v, "nf4", v is not value) for v in (value, value.mT))
    assert torch.equal(straight.levels, turned.levels)
    assert torch.equal(straight.form(), turned.form().mT) and turned.shape == (IN, OUT)


def test_pieces_do_not_matter(monkeypatch):
    whole = QuantizedWeight.of(numbers(OUT, IN), "nf4")
    monkeypatch.setattr("fedlora_mpi.models.quantized._PIECE", 128)
    pieces = QuantizedWeight.of(numbers(OUT, IN), "nf4")
    assert torch.equal(whole.levels, pieces.levels) and torch.equal(whole.scales, pieces.scales)


FUNCTIONS = {
    "linear": lambda w, x: F.linear(x, w, numbers(OUT)),
    "linear of a sequence": lambda w, x: F.linear(x.view(1, *x.shape), w),
    "addmm": lambda w, x: torch.addmm(numbers(IN), x[:, :OUT], w, beta=2.0, alpha=3.0),
    "matmul": lambda w, x: x[:, :OUT] @ w,
    "transposed": lambda w, x: x @ w.T,
    "sum": lambda w, x: w + x.sum(),
}


@pytest.mark.parametrize("input_first", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_function_gives_what_the_numbers_give_and_its_gradient(name, input_first):
    value = numbers(OUT, IN)
    stored = value.mT.contiguous().mT if input_first else value
    weight = QuantizedWeight.of(stored, "nf4", input_first)
    x = numbers(5, IN).requires_grad_()
    results = [FUNCTIONS[name](w, x) for w in (weight, weight.form())]
    torch.testing.assert_close(*results)
    assert type(results[0]) is torch.Tensor
    gradients = [torch.autograd.grad(result.square().sum(), x) for result in results]
    torch.testing.assert_close(*gradients)


def test_a_trained_bias_gets_its_gradient():
    weight, x = QuantizedWeight.of(numbers(OUT, IN), "nf4"), numbers(2, 3, IN)
    bias = numbers(OUT).requires_grad_()
    (found,) = torch.autograd.grad((F.linear(x, weight, bias) * numbers(2, 3, OUT)).sum(), bias)
    torch.testing.assert_close(found, numbers(2, 3, OUT).sum((0, 1)))
    (found,) = torch.autograd.grad(F.linear(x[0, 0], weight, bias).sum(), bias)
    assert torch.equal(found, torch.ones(OUT))


@pytest.mark.parametrize("weight", ["quantized", "unmerged"])
def test_a_layer_may_give_the_arguments_by_name(weight):
    value, x, bias = QuantizedWeight.of(numbers(OUT, IN), "nf4"), numbers(3, IN), numbers(OUT)
    if weight == "unmerged":
        value = UnmergedWeight(value, None, numbers(2, IN), numbers(OUT, 2), 0.5)
    dense = value.form()
    torch.testing.assert_close(F.linear(bias=bias, weight=value, input=x), F.linear(x, dense, bias))
    y, last = x[:, :OUT], numbers(IN)
    expected = torch.addmm(last, y, dense, beta=2)
    torch.testing.assert_close(torch.addmm(last, mat2=value, mat1=y, beta=2), expected)
    out = torch.empty(3, IN)
    torch.addmm(last, y, value, beta=2, out=out)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_under_autocast_are_those_of_the_numbers(stacked, with_bias):
    weight, bias = QuantizedWeight.of(numbers(OUT, IN), "nf4"), numbers(OUT) if with_bias else None
    x = numbers(2, 3, IN).requires_grad_()
    results = []
    for w in (weight, weight.form()):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            product = partial(F.linear, weight=w, bias=bias)
            y = (vmap(product) if stacked else product)(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), x)))
    assert results[0][0].dtype == results[1][0].dtype
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_clients_of_a_stack_have_one_weight():
    layer, weight = torch.nn.Linear(IN, OUT), QuantizedWeight.of(numbers(OUT, IN), "nf4")
    x = numbers(4, 3, IN).requires_grad_()
    results = [
        vmap(lambda x, w=w: functional_call(layer, {"weight": w}, (x,)))(x)
        for w in (weight, weight.form())
    ]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(result.square().sum(), x) for result in results]
    torch.testing.assert_close(*gradients)


def test_a_digest_is_that_of_what_is_stored():
    weight = QuantizedWeight.of(numbers(OUT, IN), "nf4")
    first = tensor_digest(weight)
    assert first == tensor_digest(QuantizedWeight.of(numbers(OUT, IN), "nf4"))
    for part in weight.parts:
        kept = part[3].clone()
        part[3] += 1
        assert tensor_digest(weight) != first
        part[3] = kept
    assert tensor_digest(weight) == first


# --- networks


def test_the_matrices_of_linears_are_frozen_and_nothing_else():
    model, plain = gpt("nf4"), gpt()
    matrices = {n for n in plain.leaves if n.startswith("blocks.") and n.endswith("weight")}
    norms = {n for n in matrices if plain.role(n) == "norm"}
    assert set(model.frozen_leaves) == matrices - norms and len(model.frozen_leaves) == 12
    assert all(isinstance(model.constants[n], QuantizedWeight) for n in model.frozen_leaves)
    assert list(model.initial) == [n for n in plain.initial if n not in model.frozen_leaves]
    assert model.all_leaves == plain.all_leaves
    assert plain.nbytes - model.nbytes == sum(
        4 * v.numel() - v.nbytes for v in map(model.constants.get, model.frozen_leaves)
    )


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("recomputed", [False, True])
def test_logits_and_gradients_are_those_of_the_numbers(dtype, merge, recomputed):
    model = gpt("nf4", dtype)
    method = find_algorithm("fedit")(lora_ranks=(2,), full=(), merge=merge)
    start, x = method.init(model, rng(1, "init")).shared, torch.arange(2 * LENGTH).view(2, LENGTH)
    start = {n: (v + numbers(*v.shape) / 9).requires_grad_() for n, v in start.items()}
    results = []
    for network in (model, with_numbers(gpt(None, dtype), model)):
        network = recompute_blocks(network) if recomputed else network
        v = method.init(network, rng(1, "init"))._replace(shared=start)
        logits = method.logits(network, v, x % TOKENS)
        gradients = torch.autograd.grad(logits.square().sum(), list(start.values()))
        results.append((logits, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_low_rank_part_at_zero_is_the_quantized_network():
    model = gpt("nf4")
    method = find_algorithm("fedit")(lora_ranks=(2,), full=())
    v, x = method.init(model, rng(1, "init")), torch.arange(2 * LENGTH).view(2, LENGTH) % TOKENS
    alone = model.eval_mode()(model.initial, x)
    assert torch.equal(method.logits(model.eval_mode(), v, x), alone)
    assert not torch.equal(alone, gpt().eval_mode()(gpt().initial, x))


def test_training_keeps_no_tensor_of_the_size_of_a_weight():
    """With the numbers in place of the weights there is one: the test would find it."""
    quantized = gpt("nf4")
    sizes = {leaf.shape for leaf in quantized.frozen_leaves.values()}
    method = find_algorithm("fedit")(lora_ranks=(2,), full=(), merge=False)
    for model in (quantized, with_numbers(gpt(), quantized)):
        v = method.init(model, rng(1, "init"))
        v = v._replace(shared={n: w.requires_grad_() for n, w in v.shared.items()})
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            method.logits(model, v, model.zero_inputs(7))
        found = {shape for shape in kept if shape in sizes or shape[::-1] in sizes}
        assert bool(found) == (model is not quantized), kept


def test_it_is_the_same_network_without_values():
    real, meta = gpt("nf4"), gpt("nf4", shapes_alone=True)
    assert meta.is_without_values and meta.nbytes == real.nbytes
    assert all(v.is_meta for v in meta.all_values.values())
    assert meta.frozen_leaves == real.frozen_leaves
    assert meta(meta.initial, meta.zero_inputs(3)).is_meta


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_what_is_stored_is_what_transformers_stores(family, tmp_path):
    folder = small_model(tmp_path, family)
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers needs it to quantize")
    settings = {"folder": str(folder)}
    model = zoo.build("hf", settings, 24, (6,), 1, 24, positions=6, quantization="nf4")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, device_map="cpu"
    )
    stored = {n: p for n, p in theirs.named_parameters() if p.dtype == torch.uint8}
    names = {n.removeprefix(model.modules[0].PREFIX): n for n in model.frozen_leaves}
    assert stored.keys() == names.keys() and len(stored) >= 4
    for name, parameter in stored.items():
        ours = model.constants[names[name]]
        assert torch.equal(ours.levels, parameter.data)
        assert torch.equal(ours.scales, parameter.quant_state.absmax)


# --- runs


@pytest.fixture(scope="module")
def same_numbers(tmp_path_factory):
    """The override for the network of ``STORED`` with the numbers of its weights in a file."""
    model = build_tiny(STORED, *TUNING).federation.clients.types[0].trainer.model
    values = {n: v.form() if n in model.frozen_leaves else v for n, v in model.all_values.items()}
    file = tmp_path_factory.mktemp("numbers") / "numbers.safetensors"
    file.write_bytes(pack_safetensors(values))
    return f"model={{{SIZES}, weights: {file}}}"


@pytest.mark.parametrize(
    "name", [tiered_param(n, id=n, thorough=n not in ("fedit", "fedhl")) for n in FAMILY]
)
@pytest.mark.parametrize("more", [(), (UNMERGED,), ("engine.path=loop", UNMERGED)], ids=str)
def test_methods_learn_what_they_learn_from_the_numbers(name, more, same_numbers):
    settings = (*overrides_for(name), *TUNING[1:], "rounds=1", *more)
    (stored,), (whole,) = (run_rounds(m, *settings) for m in (STORED, same_numbers))
    assert snapshots_equal(stored[-1], whole[-1])
    assert not snapshots_equal(stored[0], stored[-1])


@pytest.mark.parametrize("name", ["fedit", thorough_param("fedhl")])
def test_ranks_do_not_matter(name):
    settings = (STORED, *overrides_for(name), *TUNING[1:], UNMERGED)
    ((*_, whole),) = run_rounds(*settings)
    for ranks in (2, 3):
        for moments in run_rounds(*settings, ranks=ranks):
            assert snapshots_equal(whole, moments[-1])


def test_a_run_folder_holds_none_of_the_weights_and_gives_a_clients_model(tmp_path, capsys):
    """Resumed, the run ends in the same bits; read again, a client has W_0 + s B A."""
    settings = (STORED, *TUNING, UNMERGED)
    whole = create_run(1, tmp_path / "whole", *settings)
    cut = create_run(2, tmp_path / "cut", *settings, "rounds=1")
    assert resume(cut, ["rounds=2"], Solo()) == 0
    assert_same_run(whole, cut)
    client = fedlora_mpi.open_run(whole).client(0)
    model = build_tiny(*settings).federation.clients.types[0].trainer.model
    assert {weight_of(n) for n in client.variables.shared if is_factor(n)} == set(
        model.frozen_leaves
    )
    assert not set(model.frozen_leaves) & client.variables.shared.keys()
    for name, pair in client.algorithm.factor_products(client.variables.shared).items():
        expected = model.constants[name].form() + pair
        torch.testing.assert_close(torch.from_numpy(client.weights[name]), expected)
    assert main(["export", str(whole), "--client", "0", "--to", str(tmp_path / "a.pt")]) == 0
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert all(type(v) is torch.Tensor for v in state.values())


def test_a_resume_with_other_weights_is_refused(tmp_path, same_numbers):
    run = create_run(1, tmp_path / "run", STORED, *TUNING)
    with pytest.raises(Refusal, match="quantization"):
        resume(run, ["model.quantization=fp4", "rounds=3"], Solo())


@pytest.mark.thorough  # two compilations
def test_a_compiled_step_gives_the_same(same_numbers):
    settings = (*TUNING, UNMERGED, "engine.compile=true", "rounds=1")
    (stored,), (whole,) = (run_rounds(m, *settings) for m in (STORED, same_numbers))
    assert snapshots_equal(stored[-1], whole[-1])


# --- mistakes


MISTAKES = {
    "another method": (
        (STORED, "algorithm=fedavg"),
        "quantization = nf4: fedavg trains no low-rank part beside frozen weights",
    ),
    "no Linear": (
        ("model={name: cifar_resnet8, quantization: nf4}", "algorithm=fedit"),
        "quantization = nf4: the network has no Linear besides its head; leave it out",
    ),
    "longer numbers": (
        ("model={name: test_quantized:double, quantization: nf4}", "algorithm=fedit"),
        "quantization = nf4: 1.weight is float64, and only shorter numbers are quantized",
    ),
    "another kind": (
        ("model={name: mlp, quantization: int8}",),
        "model.quantization = int8: must be nf4, fp4 or null",
    ),
}


@pytest.mark.parametrize("overrides, said", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(overrides, said):
    with pytest.raises((Refusal, ConfigError, ValueError)) as error:
        build_tiny(*overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_pretraining_quantized_weights_is_refused(tmp_path, capsys):
    command = [
        "pretrain",
        str(TINY),
        STORED,
        "algorithm=fedit",
        "--to",
        str(tmp_path / "a.safetensors"),
    ]
    assert main(command) == 2
    assert "model.quantization = nf4: pretrain trains all weights" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError) as error:
        quantize(gpt(), "nf4")
    assert str(error.value) == ("bitsandbytes is not installed; pip install 'fedlora-mpi[4bit]'")


def test_the_key_is_of_every_network():
    from fedlora_mpi.config.experiment import Network
    from fedlora_mpi.config.writing import NETWORK_KEYS

    assert {f.name for f in fields(Network)} - {"name", "options"} == set(NETWORK_KEYS)
