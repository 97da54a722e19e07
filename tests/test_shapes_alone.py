"""Networks without values: built on the device meta they are the same networks, need no memory, and
count alike. ``plan --gpus`` counts large ones so.
"""

import math
from dataclasses import fields

import pytest
import torch
from causal import small_model
from methods import GPT
from runs import TINY, build_tiny, tiny_config
from tiers import thorough_param

from fedlora_mpi import plan as planning
from fedlora_mpi.cli import main
from fedlora_mpi.core.tree import storage_key
from fedlora_mpi.engine.flops import Flops
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.models import zoo
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.plan.counted import count_gpu_costs
from fedlora_mpi.plan.devices import GPUS

LENGTH, TOKENS = 6, 20
VIT = ("model={name: vit, patch: 2, width: 16, heads: 2, layers: 2, feedforward: 16}",)


def both(name: str, options: dict, **positions: int):
    """(the network with values, the network without)"""
    is_text = name in ("transformer", "gpt", "hf")
    shape = (LENGTH,) if is_text else (3, 16, 16)
    arguments = (name, options, TOKENS, shape, 1, TOKENS if is_text else 0)
    return [zoo.build(*arguments, shapes_alone=is_meta, **positions) for is_meta in (False, True)]


def check_alike(real, meta) -> None:
    assert not real.is_without_values and meta.is_without_values
    assert all(v.is_meta for v in (*meta.initial.values(), *meta.constants.values()))
    for field in fields(real):
        if field.name not in ("modules", "bodies", "initial", "constants"):
            assert getattr(real, field.name) == getattr(meta, field.name), field.name
    for trees in ((real.initial, meta.initial), (real.constants, meta.constants)):
        kinds = [{n: (v.shape, v.dtype) for n, v in tree.items()} for tree in trees]
        assert kinds[0] == kinds[1]
    x, tree = meta.zero_inputs(3), meta.detach_tree(meta.initial)
    assert x.is_meta and meta(tree, x).shape == real(real.initial, real.zero_inputs(3)).shape


@pytest.mark.parametrize("name", [n for n in zoo.BUILDERS if n != "hf"])
def test_a_network_of_this_package_is_the_same_without_values(name):
    check_alike(*both(name, {}, positions=LENGTH if name == "gpt" else 0))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_causal_model_is_the_same_without_values_and_its_weights_are_not_read(family, tmp_path):
    folder = small_model(tmp_path, family)
    real, _ = both("hf", options := {"folder": str(folder)}, positions=LENGTH)
    (folder / "model.safetensors").write_bytes(b"not read")
    shape = (LENGTH,)
    meta = zoo.build("hf", options, TOKENS, shape, 1, TOKENS, positions=LENGTH, shapes_alone=True)
    check_alike(real, meta)
    with pytest.raises(ValueError, match="texts of up to 16 tokens"):
        zoo.build("hf", options, TOKENS, (40,), 1, TOKENS, positions=40, shapes_alone=True)


def test_tensors_of_one_storage_have_one_key():
    for device in ("cpu", "meta"):
        a, b = torch.zeros(4, 3, device=device), torch.zeros(4, 3, device=device)
        assert storage_key(a) == storage_key(a[1:]) == storage_key(a.view(12)) != storage_key(b)


@pytest.mark.parametrize(
    "settings",
    [
        ("algorithm=fedit", *VIT),
        thorough_param(("algorithm=fedit", "algorithm.merge=false", *VIT)),
        thorough_param(("algorithm=fedhl", *GPT)),
        thorough_param(("algorithm=fedhl", "engine.gradient_checkpointing=true", *GPT)),
        thorough_param(("algorithm=fedavg", "model.width=4")),
        thorough_param(("algorithm=fedlora",)),
        thorough_param(("algorithm=moon",)),
        thorough_param(("algorithm=flexlora", "model={name: cifar_resnet8}")),
    ],
    ids=lambda settings: "-".join(settings)[:40],
)
def test_a_round_counts_alike_without_values(settings):
    costs, flops = [], []
    for limit in (math.inf, 0):
        config = tiny_config(*settings, "engine.path=loop", "engine.group_size=1")
        made = build(config, str(TINY), Solo(), values_up_to=limit)
        kind = made.federation.clients.types[0]
        client = made.federation.clients.type_of.index(0)
        costs.append(count_gpu_costs(kind, client, 24, GPUS["h200"], "float32"))
        flops.append(Flops(kind.trainer, kind.local_initial).round_flops(40, 1))
    real, meta = costs
    assert flops[0] == flops[1] > 0
    assert meta.client_bytes == pytest.approx(real.client_bytes, rel=0.03)
    for stage in ("train", "score"):
        lines = (getattr(cost, stage).compute for cost in costs)
        assert next(lines).cost([40], 24) == pytest.approx(next(lines).cost([40], 24), rel=0.03)


@pytest.mark.thorough  # two plans, each with its trials
def test_a_plan_of_a_large_network_says_that_it_read_no_weights(monkeypatch, capsys):
    texts = {}
    for limit in (1e12, 0):
        monkeypatch.setattr(planning, "_LARGEST_BYTES", limit)
        command = ["plan", str(TINY), "--gpus=h200", "algorithm=fedit", *VIT]
        assert main([*command, "train.batch_size=24"]) == 0
        lines = capsys.readouterr().out.splitlines()
        texts[limit] = {line.split()[0]: line for line in lines if line.strip()}
    assert "by shapes, no weights read" in texts[0]["measured"]
    assert "no weights" not in texts[1e12]["measured"]
    for line in ("model", "head", "shared", "personal", "round"):
        assert texts[0][line] == texts[1e12][line]


def test_its_samples_have_shapes_alone_and_what_the_server_sums_has_values():
    real = build_tiny("algorithm=fedit", *VIT)
    config = tiny_config("algorithm=fedit", *VIT)
    meta = build(config, str(TINY), Solo(), values_up_to=0)
    feeds = [made.federation.clients.trainer.feed for made in (real, meta)]
    assert feeds[0].nbytes == feeds[1].nbytes
    batch = feeds[1].test_batch([0], 0, 1)
    assert batch.x.is_meta and batch.y.is_meta
    assert not any(v.is_meta for v in meta.federation.clients.types[0].initial.shared.values())
