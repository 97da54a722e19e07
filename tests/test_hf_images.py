"""Image classifiers of Hugging Face as networks. Skipped without transformers."""

import json

import pytest
import torch
import torch.nn.functional as F
from runs import TESTS, TINY
from torch.func import vmap

from fedlora_mpi import config as configs
from fedlora_mpi.algorithms.fedit import FedIT
from fedlora_mpi.analysis.run_view import open_run
from fedlora_mpi.core.seeds import isolate_rng, rng
from fedlora_mpi.core.vision import import_torchvision
from fedlora_mpi.models import zoo

import_torchvision()  # see there: transformers imports it
transformers = pytest.importorskip("transformers")

CLASSES, SHAPE = 4, (1, 8, 8)
CONFIG = TESTS.parent / "configs" / "vit_cifar100.yaml"
QV = ("*attention*.q*.weight", "*attention*.v*.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny random ViT for images of 8 x 8 pixels and four classes."""
    config = transformers.ViTConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=CLASSES,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("vit")
    with isolate_rng(7, "vit"):
        transformers.ViTForImageClassification(config).save_pretrained(path)
    return path


def network(folder, classes=CLASSES, shape=SHAPE, seed=1, **options):
    return zoo.build("hf", {"folder": str(folder), **options}, classes, shape, seed)


def plain(folder):
    """The model as transformers itself loads it."""
    return transformers.ViTForImageClassification.from_pretrained(
        folder, local_files_only=True
    ).eval()


def images(*shape):
    return torch.randn(*shape, generator=rng(1, "images", *shape))


def test_the_logits_are_those_of_transformers(folder):
    model, x = network(folder).eval_mode(), images(5, *SHAPE)
    with torch.no_grad():
        theirs = plain(folder)(pixel_values=x).logits
    torch.testing.assert_close(model(model.initial, x), theirs, rtol=1e-5, atol=1e-5)
    assert theirs.std() > 0.1
    assert model.head == "model.classifier" and model.ends_in_linear and not model.couples


def test_images_are_enlarged_on_request(folder):
    model, x = network(folder, shape=(1, 4, 6), resize=True).eval_mode(), images(5, 1, 4, 6)
    with torch.no_grad():
        large = F.interpolate(x, (8, 8), mode="bilinear")
        theirs = plain(folder)(pixel_values=large).logits
    torch.testing.assert_close(model(model.initial, x), theirs, rtol=1e-5, atol=1e-5)


def test_it_may_be_stored_in_bfloat16(folder):
    def logits(**options):
        model = zoo.build(
            "hf", {"folder": str(folder), "resize": True}, CLASSES, (1, 4, 4), 1, **options
        )
        return model.eval_mode()(model.initial, images(5, 1, 4, 4))

    short, long = logits(dtype="bfloat16"), logits()
    assert short.dtype == torch.float32 and not torch.equal(short, long)
    torch.testing.assert_close(short, long, rtol=0, atol=0.1)


def test_a_stack_is_the_network_of_each_client(folder):
    model = network(folder, shape=(1, 4, 4), resize=True)
    trees = {n: v + 0.1 * images(3, *v.shape) for n, v in model.initial.items()}
    x = images(3, 5, 1, 4, 4)
    looped = [model({n: v[c] for n, v in trees.items()}, x[c]) for c in range(3)]
    torch.testing.assert_close(vmap(model)(trees, x), torch.stack(looped), rtol=1e-5, atol=1e-5)


def test_a_head_of_other_classes_is_new(folder):
    model, other = network(folder, 7), network(folder, 7, seed=2)
    theirs = plain(folder).state_dict()
    for name, value in model.initial.items():
        if model.role(name) == "head":
            assert name.endswith("bias") or not torch.equal(value, other.initial[name])
        else:
            assert torch.equal(value, theirs[name.removeprefix("model.")])


def test_lora_on_q_and_v(folder):
    model = network(folder)
    shapes = FedIT(layers=QV).adapted_shapes(model)
    assert list(shapes.values()) == [(12, 12)] * 4 and not any("k_proj" in n for n in shapes)
    assert model.fused == {}  # q, k and v are Linears of their own


@pytest.mark.parametrize(
    "shape, options, message",
    [
        (
            (1, 4, 4),
            {},
            r"folder = .*: refuses images of 1 x 4 x 4: .*; resize: true enlarges images to the "
            "size that it reads$",
        ),
        ((3, 8, 8), {"resize": True}, "folder = .*: refuses images of 3 x 8 x 8: .*channel"),
        ((8,), {}, "it is for images, an input of the data has the shape"),
    ],
)
def test_images_that_do_not_fit_are_refused(folder, shape, options, message):
    with pytest.raises(ValueError, match=f"^name = hf: cannot be built: {message}") as error:
        network(folder, shape=shape, **options)
    assert "\n" not in str(error.value)


def test_a_model_of_texts_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    message = "transformers cannot read it: it has no image classifier of the kind bert$"
    with pytest.raises(ValueError, match=message):
        network(tmp_path / "config.json")


def test_a_missing_layer_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not fit config.json: vit.* and [0-9]+ more$"):
        network(tmp_path)


def test_a_run_trains_q_and_v_and_the_head(folder, call):
    layers = ", ".join(f'"{pattern}"' for pattern in QV)
    how = f"model={{name: hf, folder: {folder}}}", "algorithm=fedhl", f"algorithm.layers=[{layers}]"
    code, *_ = call("run", TINY, *how, "rounds=1", "train.epochs=1", "output=run")
    assert code == 0
    client = open_run("run").client(0)
    before = client.network.initial
    changed = {n for n, w in client.weights.items() if not torch.equal(before[n], torch.tensor(w))}
    adapted = {*FedIT(layers=QV).adapted_shapes(client.network)}
    assert changed == {"model.classifier.weight", "model.classifier.bias", *adapted}


def test_the_config_of_the_repository_adapts_q_and_v(folder):
    config = configs.read(CONFIG, [f"model.folder={folder}"])
    (block,) = config.model.mix
    model = network(shape=(1, 4, 4), **block.options)
    assert len(config.algorithm.adapted_shapes(model)) == 4
    assert (config.algorithm.layers, config.participation) == (QV, 0.1)
    assert config.data.partition.clients == 100
