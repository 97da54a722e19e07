"""The zoo's vision Transformer ``vit``."""

from functools import partial

import pytest
import torch
from runs import TINY, run_rounds, snapshots_equal
from tiers import thorough_param
from torch import nn
from torch.func import vmap

from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.vision import import_torchvision
from fedlora_mpi.models import weights, zoo
from fedlora_mpi.models.substitutes import Substitutes

SMALL = {"patch": 2, "width": 12, "heads": 2, "layers": 2, "feedforward": 20}
TINY_VIT = "model={name: vit, patch: 4, width: 8, heads: 2, layers: 1, feedforward: 12}"
CLASSES, SHAPE = 4, (3, 8, 6)


def build_vit(shape=SHAPE, **options):
    return zoo.build("vit", SMALL | options, CLASSES, shape, 1)


def numbers(*shape):
    return torch.randn(*shape, generator=rng(1, "vit", *shape))


NAMES = {  # of what comes before, of what is in, and of what comes after the blocks: torchvision's
    "embedding.class_token": "class_token",
    "embedding.places.weight": "encoder.pos_embedding",
    "embedding.patches.weight": "conv_proj.weight",
    "embedding.patches.bias": "conv_proj.bias",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attention": "self_attention",
    "linear1": "mlp.0",
    "linear2": "mlp.3",
    "norm.weight": "encoder.ln.weight",
    "norm.bias": "encoder.ln.bias",
    "head.weight": "heads.head.weight",
    "head.bias": "heads.head.bias",
}


def torchvision_name(leaf):
    if leaf in NAMES:
        return NAMES[leaf]
    _, number, layer, rest = leaf.split(".", 3)
    return f"encoder.layers.encoder_layer_{number}.{NAMES[layer]}.{rest}"


def test_the_logits_are_those_of_torchvision_s_vision_transformer():
    model = build_vit((3, 8, 8)).eval_mode()
    tree = {n: v + 0.1 * numbers(*v.shape) for n, v in model.initial.items()}
    theirs = import_torchvision().models.VisionTransformer(
        8, 2, 2, 2, 12, 20, num_classes=CLASSES, norm_layer=partial(nn.LayerNorm, eps=1e-5)
    )
    shapes = {n: v.shape for n, v in theirs.state_dict().items()}
    theirs.load_state_dict(
        {torchvision_name(n): v.reshape(shapes[torchvision_name(n)]) for n, v in tree.items()}
    )
    x = numbers(5, 3, 8, 8)
    torch.testing.assert_close(model(tree, x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_the_default_fits_cifar():
    model = zoo.build("vit", {}, 10, (3, 32, 32), 1)
    parameters = sum(v.numel() for v in model.initial.values())
    assert f"{parameters:,}" in " ".join(zoo.vit.__doc__.split())
    assert model.initial["embedding.places.weight"].shape == (1 + 64, 128)
    assert model.head == "head" and model.ends_in_linear and not model.batch_statistics


def test_low_rank_parts_fit_its_matrices():
    matrices = {n: leaf.matrix for n, leaf in build_vit(layers=1).leaves.items() if leaf.matrix}
    linear = (
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    )
    expected = {f"blocks.0.{name}": "linear" for name in linear} | {"head.weight": "linear"}
    assert matrices == expected | {"embedding.patches.weight": "conv"}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stack_is_the_network_of_each_client(dropout):
    model = build_vit(dropout=dropout)
    tree_C = {n: v + 0.1 * numbers(3, *v.shape) for n, v in model.initial.items()}
    x_C, keys_C = numbers(3, 5, *SHAPE), torch.tensor([8, 9, 3])

    def one(tree, x, key):
        with Substitutes(None, key):
            return model(tree, x)

    looped = torch.stack(
        [one({n: v[c] for n, v in tree_C.items()}, x_C[c], keys_C[c]) for c in range(3)]
    )
    torch.testing.assert_close(vmap(one)(tree_C, x_C, keys_C), looped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch": 4}, "patch = 4: must be at least 1 and divide the sides of the images, 8 x 6"),
        ({"patch": 0}, "patch = 0: must be at least 1 and divide"),
        ({"heads": 5}, "heads = 5: must divide width = 12"),
        ({"layers": 0}, "layers = 0: must be an integer of at least 1"),
        ({"dropout": 1.0}, "dropout = 1.0: must be at least 0 and below 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^name = vit: cannot be built: {message}"):
        build_vit(**options)


@pytest.mark.parametrize("shape, tokens, data", [((8,), 9, "texts"), ((8,), 0, "an input")])
def test_it_is_for_images(shape, tokens, data):
    with pytest.raises(
        ValueError, match=f"name = vit: cannot be built: it is for images, .*{data}"
    ):
        zoo.build("vit", {}, 3, shape, 1, tokens)


@pytest.mark.parametrize(
    "algorithm", ["fedavg", thorough_param("fedlora"), thorough_param("fedit")]
)
def test_it_trains_alike_in_loop_and_stack(algorithm):
    how = TINY_VIT, f"algorithm={algorithm}", "rounds=1", "train.epochs=2"
    stack, loop = (run_rounds(*how, f"engine.path={path}")[0] for path in ("stack", "loop"))
    for leaf, value in stack[-1].shared.items():
        torch.testing.assert_close(value, loop[-1].shared[leaf], rtol=0, atol=1e-5)
    assert not snapshots_equal(stack[0], stack[-1])


def test_a_run_starts_from_weights_of_pretrain(call, tmp_path):
    code, *_ = call("pretrain", TINY, TINY_VIT, "--epochs", 1, "--to", "vit.safetensors")
    model = {**SMALL, "patch": 4, "width": 8, "layers": 1, "feedforward": 12}
    saved = weights.read(tmp_path / "vit.safetensors")
    shape = (1, 8, 8)
    loaded = zoo.build("vit", model, 4, shape, 1, weights=str(tmp_path / "vit.safetensors"))
    assert code == 0 and all(torch.equal(loaded.initial[n], v) for n, v in saved.items())
