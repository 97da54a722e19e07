"""Gradient checkpointing: the same numbers from less memory."""

import re
from contextlib import nullcontext

import pytest
import torch
from runs import build_tiny, create_run, run_outcome, run_rounds, snapshots_equal
from tiers import thorough_param

from fedlora_mpi import config as configs
from fedlora_mpi.algorithms import find_algorithm
from fedlora_mpi.core.batch import Batch
from fedlora_mpi.core.losses import find_loss
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.engine.half import bfloat16_forward
from fedlora_mpi.models import zoo
from fedlora_mpi.models.recomputing import recompute_blocks
from fedlora_mpi.mpi.ending import Refusal

LENGTH, TOKENS = 6, 11
VIT = "model={name: vit, patch: 4, width: 8, heads: 2, layers: 2, feedforward: 12, dropout: 0.2}"
ON, LOOP = "engine.gradient_checkpointing=true", "engine.path=loop"


def gpt(dropout=0.0, dtype=None, layers=4):
    sizes = {"width": 8, "heads": 2, "layers": layers, "feedforward": 12, "dropout": dropout}
    return zoo.build("gpt", sizes, TOKENS, (LENGTH,), 1, TOKENS, positions=LENGTH, dtype=dtype)


def gradients(model, method, precision="float32"):
    """(loss, gradients, bytes that the pass keeps) of a batch of texts."""
    v = method.init(model, rng(1, "init"))
    leaves = {n: w.float().requires_grad_() for n, w in v.shared.items()}
    x = torch.randint(TOKENS, (3, LENGTH), generator=rng(1, "x"))
    batch = Batch(x, x.roll(-1, 1), None, torch.tensor(5), torch.ones(1))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    context = bfloat16_forward(x.device, False) if precision == "bf16" else nullcontext()
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        context,
        model.training_context(batch),
    ):
        logits = method.logits(model, v._replace(shared=leaves), batch.x)
        loss = find_loss("next_token")(logits, batch)
    return loss, torch.autograd.grad(loss, list(leaves.values())), sum(kept.values())


METHODS = {
    "dense": find_algorithm("fedavg")(),
    "lora": find_algorithm("fedit")(lora_ranks=(2,), full=()),
    "unmerged": find_algorithm("fedit")(lora_ranks=(2,), full=(), merge=False),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype, precision", [(None, "float32"), (None, "bf16"), ("bfloat16", "")])
def test_losses_and_gradients_have_the_same_bits(method, dropout, dtype, precision):
    model = gpt(dropout, dtype)
    plain, again = (
        gradients(m, METHODS[method], precision) for m in (model, recompute_blocks(model))
    )
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], again[1], strict=True))


def test_a_pass_keeps_less_for_each_further_block():
    few, many = (
        [gradients(m, METHODS["unmerged"])[2] for m in (model, recompute_blocks(model))]
        for model in (gpt(layers=2), gpt(layers=6))
    )
    plain, again = (b - a for a, b in zip(few, many, strict=True))
    assert again < 0.2 * plain


def test_an_evaluation_is_as_before():
    model = gpt(0.3)
    x = torch.ones(2, LENGTH, dtype=torch.int64)
    a, b = (m.eval_mode()(m.initial, x) for m in (model, recompute_blocks(model)))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "method", ["fedit", *(thorough_param(n) for n in ("fedavg", "fedproto", "moon", "fedhl"))]
)
def test_runs_have_the_same_bits(method):
    settings = (VIT, f"algorithm={method}", "train.lr=0.02", LOOP, "rounds=2")
    ((*_, plain),) = run_rounds(*settings)
    for ranks in (1, 2):
        for moments in run_rounds(*settings, ON, ranks=ranks):
            last = moments[-1]
            assert last.row["flops"] > plain.row["flops"]  # blocks are computed twice
            row = last.row | {"flops": plain.row["flops"]}
            assert snapshots_equal(plain, last._replace(row=row))


def test_auto_trains_one_by_one(tmp_path):
    folder = create_run(
        1, tmp_path / "run", VIT, "algorithm=fedit", ON, "engine.path=auto", "rounds=1"
    )
    engine = configs.read_recorded(folder / "config.yaml").engine
    assert engine.path == "loop" and engine.gradient_checkpointing
    assert run_outcome(folder)["round"] == 1


def test_a_change_inside_a_block_is_refused():
    model = recompute_blocks(gpt())
    x = torch.ones(2, LENGTH, dtype=torch.int64)
    model.replace_output(model.initial, x, "blocks.1", lambda h: h)  # after the block
    with pytest.raises(ValueError, match=r"gradient_checkpointing = true: .*blocks\.1\.query"):
        model.replace_output(model.initial, x, "blocks.1.query", lambda h: h)
    model.eval_mode().replace_output(model.initial, x, "blocks.1.query", lambda h: h)


MISTAKES = [
    ((), "engine.gradient_checkpointing = true: the network has no list of blocks"),
    (("model=cifar_resnet8",), "statistics of BatchNorm"),
    ((VIT, "engine.path=stack"), "path = stack: with gradient_checkpointing"),
    ((VIT, "engine.path=measure"), "path = measure: with gradient_checkpointing"),
    ((VIT, LOOP, "engine.compile=true"), "compile = true: with gradient_checkpointing"),
]


@pytest.mark.parametrize("more, said", MISTAKES)
def test_mistakes_are_one_line(more, said):
    settings = more if any("path" in m for m in more) else (*more, LOOP)
    with pytest.raises((Refusal, configs.ConfigError)) as error:
        build_tiny(*settings, ON)
    assert "\n" not in str(error.value) and re.search(re.escape(said), str(error.value))
