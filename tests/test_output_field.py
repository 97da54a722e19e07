"""Networks that return more than their logits: which field is taken, and what is said of others."""

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import odd_networks
import pytest
import torch
from odd_networks import CLASSES, SHAPE
from runs import TINY
from torch import Tensor

from fedlora_mpi import open_run
from fedlora_mpi.cli import main
from fedlora_mpi.core.seeds import isolate_rng, rng
from fedlora_mpi.models.network import from_module

Pair = namedtuple("Pair", "logits z")


@dataclass
class Result:
    loss: Any
    scores: Tensor
    z: Tensor


PACKED = {
    "tuple": (lambda y, z: (z, y), 1),
    "list": (lambda y, z: [y, z], 0),
    "dict": (lambda y, z: {"z": z, "y": y}, "y"),
    "namedtuple": (lambda y, z: Pair(y, z), "logits"),
    "dataclass": (lambda y, z: Result(None, y, z), "scores"),
    "object": (lambda y, z: SimpleNamespace(scores=y, z=z), "scores"),
    "called logits": (lambda y, z: {"auxiliary": y + 1, "logits": y}, "logits"),
    "nested": (lambda y, z: {"hidden": (z, z), "y": y}, "y"),
}


class Packed(odd_networks.Net):
    """``Net`` whose logits y and features z are put into one output."""

    def __init__(self, classes, shape, pack):
        super().__init__(classes, shape)
        self.pack = pack

    def forward(self, x):
        z = self.z(x)
        return self.pack(self.fc(z), z)


def made(pack, **keys):
    with isolate_rng(1, "test"):
        return from_module(Packed(CLASSES, SHAPE, pack), CLASSES, SHAPE, **keys)


def plain():
    return made(lambda y, z: y)


def images():
    return torch.randn(3, *SHAPE, generator=rng(1, "test"))


@pytest.mark.parametrize("pack, field", PACKED.values(), ids=PACKED)
def test_a_network_that_packs_its_logits_is_the_one_that_returns_them(pack, field):
    network, expected, x = made(pack), plain(), images()
    assert (network.output, expected.output) == (field, None)
    assert network.all_leaves == expected.all_leaves and network.head == "fc"
    for mode in (network, network.eval_mode()):
        assert torch.equal(mode(network.initial, x), expected.eval_mode()(expected.initial, x))
    assert network.ends_in_linear
    assert torch.equal(network.features(network.initial, x), expected.features(expected.initial, x))
    module = network.to_module(network.initial)
    assert torch.equal(module(x), network.eval_mode()(network.initial, x))


@pytest.mark.parametrize("field, scale", [("a", 1), ("b", 2), (0, 1), (1, 2), (-1, 2)])
def test_the_config_names_a_field_by_name_or_number(field, scale):
    network, x = made(lambda y, z: {"a": y, "b": 2 * y}, output=field), images()
    expected = plain()
    assert network.output == field
    assert torch.equal(network(network.initial, x), scale * expected(expected.initial, x))


def test_a_network_may_return_several_values_in_training_only():
    class InTraining(odd_networks.Net):
        def forward(self, x):
            y = super().forward(x)
            return {"logits": y, "auxiliary": y + 1} if self.training else y

    with isolate_rng(1, "test"):
        network = from_module(InTraining(CLASSES, SHAPE), CLASSES, SHAPE)
    expected, x = plain(), images()
    for a, b in ((network, expected), (network.eval_mode(), expected.eval_mode())):
        assert torch.equal(a(a.initial, x), b(b.initial, x))


@pytest.mark.parametrize(
    "pack, output, text",
    [
        (
            lambda y, z: {"a": y, "b": y, "z": z},
            None,
            r"name: the model gives dict with a \[2, 4\], b \[2, 4\], z \[2, 6\] for 2 samples; "
            "name the field of the logits, such as model.output=a$",
        ),
        (lambda y, z: (z, z), None, r"gives tuple with 0 \[2, 6\], 1 \[2, 6\] for 2 samples, none"),
        (lambda y, z: {"z": z, "n": 5}, None, r"z \[2, 6\], n int for 2 samples, none of which"),
        (lambda y, z: (y, z), 2, r"output = 2: is no field; the model returns tuple with 0 \[2, 4"),
        (lambda y, z: {"y": y}, "x", r"output = x: is no field; the model returns dict with y "),
        (lambda y, z: {"z": z}, "z", r"output = z: the field gives \[2, 6\] for 2 samples, not "),
        (lambda y, z: y, "y", "output = y: the model returns a tensor; leave the key out"),
        (lambda y, z: None, None, "gives NoneType for 2 samples, none of which"),
    ],
)
def test_a_field_that_is_not_clear_is_asked_for_in_one_line(pack, output, text):
    with pytest.raises(ValueError, match=f"^{text}" if "name:" in text else text):
        made(pack, output=output)


def with_auxiliary(classes, shape):
    return Packed(classes, shape, lambda y, z: {"main": y, "auxiliary": 0 * y})


def test_a_run_takes_the_field_of_its_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    which = (
        "model=test_output_field:with_auxiliary",
        "algorithm=fedper",
        "rounds=1",
        "train.epochs=1",
    )
    assert main(["run", str(TINY), *which]) == 2
    line = capsys.readouterr().err
    assert "tiny.yaml: model.name: the model gives dict with main [2, 4], auxiliary [2, 4]" in line
    assert line.count("\n") == 1 and not (tmp_path / "run").exists()
    assert main(["run", str(TINY), *which, "model.output=main"]) == 0
    assert "\n  output: main\n" in (tmp_path / "run/config.yaml").read_text()
    x, run = images(), open_run(tmp_path / "run")
    logits = [run.client(client).model(x) for client in range(7)]
    assert all(y.shape == (3, CLASSES) and y.any() for y in logits)
    assert len({tuple(y.flatten().tolist()) for y in logits}) == 5, "4 of 7 clients were trained"


def test_a_plan_names_the_field(capsys, unmeasured):
    which = ("model=test_output_field:with_auxiliary", "algorithm=fedper", "model.output=0")
    assert main(["plan", str(TINY), *which, "model.head=fc"]) == 0
    expected = "head       fc, named by model.head; the logits are the field 0 of the output\n"
    assert expected in capsys.readouterr().out
