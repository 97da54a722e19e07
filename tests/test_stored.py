"""Networks whose parameters are stored in bfloat16: ``model.dtype``."""

from dataclasses import fields

import pytest
import torch
from runs import (
    assert_near,
    assert_same_run,
    build_tiny,
    create_run,
    run_rounds,
    snapshots_equal,
)
from tiers import thorough_param

from fedlora_mpi.config.blocks import ConfigError
from fedlora_mpi.core.seeds import isolate_rng
from fedlora_mpi.core.tree import nbytes
from fedlora_mpi.experiment.loop import resume
from fedlora_mpi.models import zoo
from fedlora_mpi.models.network import from_module
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import Refusal

LENGTH, TOKENS = 6, 11
STORED = "model={name: mlp, hidden: 8, dtype: bfloat16}"
TUNING = (
    "algorithm=fedit",
    "algorithm.full=[]",
    "algorithm.lora_ranks=[3,1,2]",
    "algorithm.alpha=3",
    "train.lr=0.02",
)


def gpt(dtype=None):
    sizes = {"width": 8, "heads": 2, "layers": 2, "feedforward": 12}
    return zoo.build("gpt", sizes, TOKENS, (LENGTH,), 1, TOKENS, positions=LENGTH, dtype=dtype)


def test_parameters_take_half_the_memory_and_logits_are_whole():
    whole, stored = gpt(), gpt("bfloat16")
    assert nbytes(stored.initial) * 2 == nbytes(whole.initial)
    x = torch.arange(2 * LENGTH).view(2, LENGTH) % TOKENS
    a, b = (model.eval_mode()(model.initial, x) for model in (whole, stored))
    assert b.dtype == torch.float32 and not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    features = stored.eval_mode().features(stored.initial, x)
    assert features.dtype == torch.float32
    torch.testing.assert_close(stored.eval_mode().classify(stored.initial, features), b)


def test_inputs_that_are_numbers_are_rounded_too():
    model = zoo.build("mlp", {"hidden": 5}, 3, (2, 4, 4), 1, dtype="bfloat16")
    assert model(model.initial, torch.ones(2, 2, 4, 4)).dtype == torch.float32
    assert model.ends_in_linear


def test_clients_train_whole_copies_of_what_is_stored():
    parts = build_tiny(STORED, "algorithm=fedavg")
    (kind,) = parts.federation.clients.types
    stored = kind.trainer.model.initial
    assert {v.dtype for v in stored.values()} == {torch.bfloat16}
    assert_near(kind.initial.shared, {n: v.float() for n, v in stored.items()}, 0)


@pytest.mark.parametrize("merge", ["true", "false"])
def test_a_small_step_is_not_lost(merge):
    """In bfloat16 itself, 1 + 1e-4 is 1."""
    settings = (STORED, *TUNING[:4], "train.lr=1e-5", f"algorithm.merge={merge}", "rounds=1")
    ((first, last),) = run_rounds(*settings)
    changed = [n for n, v in first.shared.items() if not torch.equal(v, last.shared[n])]
    assert changed and all(last.shared[n].dtype == torch.float32 for n in changed)
    assert not any("head" in n for n in first.shared)  # the rest is in the network alone


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((*TUNING, "algorithm.merge=false"), id="fedit"),
        thorough_param(TUNING, id="merged"),
        thorough_param(("algorithm=fedhl", "train.lr=0.02"), id="fedhl"),
        thorough_param(("algorithm=fedavg",), id="fedavg"),
        thorough_param(("algorithm=fedlora",), id="fedlora"),
        thorough_param((*TUNING, "engine.path=loop"), id="loop"),
    ],
)
def test_ranks_do_not_matter(more):
    ((*_, whole),) = run_rounds(STORED, *more, "rounds=2")
    for ranks in (2, 3):
        for moments in run_rounds(STORED, *more, "rounds=2", ranks=ranks):
            assert snapshots_equal(whole, moments[-1])


def test_it_learns_about_as_well(tmp_path):
    accuracy = [
        run_rounds(f"model={{name: mlp, hidden: 8{dtype}}}", "algorithm=fedavg")[0][-1].row[
            "accuracy"
        ]
        for dtype in ("", ", dtype: bfloat16")
    ]
    assert abs(accuracy[0] - accuracy[1]) < 0.1 and accuracy[1] > 0.5


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    whole = create_run(1, tmp_path / "whole", STORED, *TUNING, "rounds=4")
    cut = create_run(2, tmp_path / "cut", STORED, *TUNING, "rounds=2")
    assert resume(cut, ["rounds=4"], Solo()) == 0
    assert_same_run(whole, cut)


def test_statistics_are_refused_in_one_line():
    with pytest.raises((Refusal, ValueError)) as error:
        build_tiny("model={name: cifar_resnet8, dtype: bfloat16}")
    assert "dtype = bfloat16: layer" in str(error.value) and "\n" not in str(error.value)


def test_other_types_are_refused_in_one_line():
    with pytest.raises(ConfigError, match="dtype"):
        build_tiny("model={name: mlp, dtype: int8}")


def own_module(name):
    """(a network of this package, its classes, its inputs' shape, its tokens, its positions)"""
    text = name in ("transformer", "gpt")
    shape = (LENGTH,) if text else (3, 16, 16)
    with isolate_rng(1, "own"):
        tokens = {"tokens": TOKENS} if text else {}
        module = zoo.BUILDERS[name](TOKENS, shape, **tokens)
    return module, TOKENS, shape, TOKENS if text else 0, LENGTH if name == "gpt" else 0


@pytest.mark.parametrize("name", [n for n in zoo.BUILDERS if n != "hf"])
def test_own_networks_are_what_a_trial_would_find_and_are_not_copied(name):
    module, classes, shape, tokens, positions = own_module(name)
    tried, kept = (
        from_module(
            module, classes, shape, tokens, positions=positions, trial=not is_own, keep=is_own
        )
        for is_own in (False, True)
    )
    own = {v.data_ptr() for v in (*module.parameters(), *module.buffers())}
    assert {v.data_ptr() for v in kept.initial.values()} <= own
    assert not own & {v.data_ptr() for v in tried.initial.values()}
    skip = ("modules", "bodies", "initial", "constants")
    for field in fields(tried):
        if field.name not in skip:
            assert getattr(tried, field.name) == getattr(kept, field.name), field.name
    assert_near(tried.initial, kept.initial, 0)
    x = torch.ones(2, *shape, dtype=torch.int64 if tokens else torch.float32)
    a, b = (m.eval_mode()(m.initial, x) for m in (tried, kept))
    assert torch.equal(a, b)
