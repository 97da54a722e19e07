"""What clients never train is told, recorded and reported."""

import pytest
import small
from methods import FIELDS
from runs import TINY, build_tiny, tiny_config
from small import make_model

from fedlora_mpi.algorithm import LocalTraining
from fedlora_mpi.algorithms import algorithm_names, find_algorithm
from fedlora_mpi.algorithms.fedhl import FedHL
from fedlora_mpi.algorithms.fedlora import FedLoRA
from fedlora_mpi.algorithms.fedrep import FedRep
from fedlora_mpi.algorithms.pfedlora import PFedLoRA
from fedlora_mpi.algorithms.pfedme import PFedMe
from fedlora_mpi.experiment.hints import method_doubts, run_hints, setting_doubts, untrained_parts
from fedlora_mpi.store.reader import RunFiles

IID = ["data.partition.kind=iid", "data.partition.train=20", "data.partition.test=5"]


def doubts(method, epochs):
    model, train = make_model("bn_net"), LocalTraining(epochs=epochs, batch_size=5)
    trainer = small.make_trainer(method, "bn_net", train)
    shared = trainer.transport.download(small.initial_variables(trainer).shared)
    return untrained_parts(method, model, train, shared)


@pytest.mark.parametrize("name", algorithm_names())
def test_no_method_is_doubtful_by_default(name):
    fields = {"small": "cnn5"} if name in ("fml", "fedkd", "fedapen") else {}
    if name in ("fml", "fedkd", "fedapen"):
        fields["small"] = "small:cnn"
    assert doubts(find_algorithm(name)(**fields | FIELDS.get(name, {})), epochs=5) == []


@pytest.mark.parametrize(
    "method, train, expected",
    [
        (PFedMe(), {"lr": 0.005}, []),
        (PFedMe(), {"lr": 1 / 15}, []),
        (
            PFedMe(),
            {"lr": 0.1},
            [
                "pfedme: train.lr = 0.1 with lam = 15: w_i overshoots theta_i by 0.5 of their "
                "distance; authors: 0.005"
            ],
        ),
        (FedHL(), {}, []),
        (FedHL(weight_mode="samples"), {}, []),
        (FedHL(weight_mode="fedhera", eps_relative=0.01), {}, []),
        *(
            (
                FedHL(weight_mode=mode),
                {},
                [
                    f"fedhl: weight_mode = {mode}: a client whose rank holds all of W gets nearly "
                    "the whole weight; drift bounds it"
                ],
            )
            for mode in ("inverse", "fedhera", "fedhera_samples")
        ),
    ],
)
def test_what_a_method_allows_but_doubts_is_a_hint(method, train, expected):
    settings = LocalTraining(momentum=0.0, **train)
    assert method_doubts(method, make_model("bn_net"), settings) == expected


def test_a_run_tells_what_its_method_doubts_and_records_it(call, tmp_path):
    run = tmp_path / "run"
    settings = ("algorithm=pfedme", "train.lr=0.1", "train.momentum=0", "rounds=1")
    code, _, err = call("run", TINY, *settings, f"output={run}")
    hints = [line for line in err.splitlines() if "overshoots" in line]
    assert code == 0 and len(hints) == 1 and "UserWarning" not in err
    assert RunFiles(run).hints == [hints[0].removeprefix("hint: ")]


@pytest.mark.parametrize("block, dataset", [("table", "table"), ("language", "text_lm")])
def test_a_key_of_clients_that_the_partition_does_not_use_is_told(block, dataset):
    data = f"{{dataset: {dataset}, {block}: {{client: author}}"
    given, other = (
        tiny_config(f"data={data}, partition: {kind}}}")
        for kind in ("given", "{kind: iid, clients: 2, train: 3, test: 2}")
    )
    assert setting_doubts(given) == setting_doubts(tiny_config()) == []
    (line,) = setting_doubts(other)
    assert line == (
        f"data.{block}.client = author: is not used, as data.partition.kind is iid; given takes "
        "the clients of the files"
    )


@pytest.mark.parametrize("merge", ["true", "false"])
def test_quantized_weights_that_are_formed_for_every_client_are_told(merge):
    pytest.importorskip("bitsandbytes")
    network = "model={name: mlp, hidden: 8, quantization: nf4}"
    lines = run_hints(build_tiny(network, "algorithm=fedit", f"algorithm.merge={merge}"))
    assert sum("algorithm.merge=false holds adapted" in line for line in lines) == (merge == "true")


def test_epochs_that_leave_none_for_the_shared_part_are_told_with_their_keys():
    (line,) = doubts(FedLoRA(lora_epochs=2), epochs=2)
    assert line.startswith("fedlora: phase 2 of 2 of local training has no epoch; no phase trains ")
    assert line.endswith("which clients share (train.epochs = 2, algorithm.lora_epochs = 2)")
    (line,) = doubts(FedRep(head_epochs=3), epochs=3)
    assert "phase 2 of 2" in line and "algorithm.head_epochs = 3" in line


def test_a_phase_without_epochs_is_told_even_if_it_trains_no_parameter_of_the_network():
    (line,) = doubts(PFedLoRA(adapter_epochs=0), epochs=2)
    assert line == (
        "pfedlora: phase 2 of 2 of local training has no epoch "
        "(train.epochs = 2, algorithm.adapter_epochs = 0)"
    )


def test_a_run_tells_it_once_and_its_report_shows_it(call, tmp_path):
    run = tmp_path / "run"
    code, _, err = call(
        "run", TINY, "train.epochs=2", "algorithm.lora_epochs=2", "rounds=1", f"output={run}"
    )
    assert code == 0
    hints = [line for line in err.splitlines() if line.startswith("hint: fedlora: phase 2")]
    assert len(hints) == 1 and "hint: round 1: the drift is exactly 0" in err
    assert RunFiles(run).hints == [hints[0].removeprefix("hint: ")]
    code, out, _ = call("report", run)
    assert code == 0 and out.splitlines()[-1] == f"{run}: {hints[0].removeprefix('hint: ')}"


def test_ranks_are_recommended_only_where_there_is_a_launcher(monkeypatch):
    monkeypatch.setattr("fedlora_mpi.experiment.hints.os.cpu_count", lambda: 8)
    for launcher, count in (("mpirun", 1), (None, 0)):
        monkeypatch.setattr(
            "fedlora_mpi.experiment.hints.find_mpirun", lambda found=launcher: found
        )
        lines = [line for line in run_hints(build_tiny()) if "cores are busy" in line]
        assert lines == ["1 of 8 cores are busy; --ranks 9 would use them all"] * count


def test_bfloat16_is_recommended_where_the_cpu_and_the_network_gain(monkeypatch):
    monkeypatch.setattr("fedlora_mpi.experiment.hints._BFLOAT16_FLOP", 1e4)
    for can, precision, count in (
        (True, "float32", 1),
        (False, "float32", 0),
        (True, "bf16", 0),
    ):
        monkeypatch.setattr("fedlora_mpi.experiment.hints.multiplies_bfloat16", lambda can=can: can)
        lines = run_hints(build_tiny(f"engine.precision={precision}"))
        assert sum("engine.precision=bf16" in line for line in lines) == count
    monkeypatch.undo()
    assert not any("bf16" in line for line in run_hints(build_tiny()))  # of a tiny network


def test_a_reset_key_is_told_and_recorded_but_is_no_doubt_of_the_report(call, tmp_path):
    for name, overrides in (("a", IID), ("b", [])):
        run = tmp_path / name
        code, _, err = call("run", TINY, *overrides, "rounds=1", f"output={run}")
        assert code == 0 and "drift is exactly" not in err
        told = [line for line in err.splitlines() if " resets " in line]
        assert len(told) == bool(overrides)
        keys = ("data.partition.alpha = 0.7 (", "data.partition.minimum = 5 (")
        assert all(key in line for line in told for key in keys)
        text = (run / "config.yaml").read_text()
        assert all(f"# Hint: {line.removeprefix('hint: ')}\n" in text for line in told)
        assert RunFiles(run).hints == []
