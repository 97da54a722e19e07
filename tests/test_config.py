"""A config is read, merged, checked and written back; every mistake is one line that says the way
out.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest

from fedlora_mpi.algorithms import find_algorithm
from fedlora_mpi.config import (
    annotated_yaml,
    checksummed_yaml,
    digest,
    from_dict,
    from_recorded,
    read,
    read_recorded,
    resolved_dict,
    resolved_yaml,
)
from fedlora_mpi.config.blocks import ConfigError, Origin, build_block
from fedlora_mpi.config.former import RENAMED_VALUES, VALUES_BEFORE_KEYS

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
GOOD = """\
rounds: 7
data: {dataset: cifar10, partition: {kind: dirichlet_client, alpha: 0.1, clients: 6}}
model: resnet8
algorithm: {name: fedlora, lora_epochs: 1}
train: {epochs: 2, lr: 1e-3}
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text: str, name: str = "x.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return to_file


def with_line(key: str, line: str) -> str:
    """GOOD with the line of a top-level key replaced, or a line added."""
    kept = [old for old in GOOD.splitlines() if old.partition(":")[0] != key]
    return "\n".join([*kept, line, ""])


BAD_FILES = [
    ("train: {lr: 0.1", "line 1, column 16: expected ',' or '}'"),
    ("train:\n\tlr: 0.1", "line 2, column 1: found character '\\t'"),
    ("a: 1\n---\nb: 1", "line 2, column 1: but found another document"),
    ("", "the file is empty"),
    ("# nothing", "the file is empty"),
    ("- 1\n- 2", "must hold keys and values, such as 'rounds: 300'; here is [1, 2]"),
    ("rounds: 1\n\0", "character 10"),
    ("rounds: 1\nseed: 2\nrounds: 3", "line 3, column 1: rounds is given twice, first in line 1"),
    ("train: {lr: 1.0, lr: 2.0}", "line 1, column 18: lr is given twice"),
    ("1: 2", "line 1, column 1: a key must be text"),
    ("? [a]\n: 2", "line 1, column 3: a key must be text"),
    ("train: &t {lr: 1.0}", "line 1, column 8: tags, anchors and aliases"),
    ("train: !!python/object:os.system {}", "line 1, column 8: tags, anchors and aliases"),
    (with_line("data", ""), "data: must be given"),
    (with_line("data", "data: cifar10"), "data = cifar10: must be a block with dataset,"),
    (with_line("data", "data: {dataset: cifar10}"), "data.partition: must be given"),
    (
        with_line("data", "data: {dataset: cifar10, partition: {alpha: 0.1}}"),
        "data.partition.kind: must be given: dirichlet_client,",
    ),
    (
        with_line("data", "data: {dataset: cifar10, partition: {kind: iid, alpha: 0.1}}"),
        "data.partition.alpha = 0.1: iid has no such field; it has clients, train",
    ),
    (
        with_line("data", "data: {dataset: digits, partition: iid, rot: x}"),
        "data.rot = x: data has no such field",
        "Did you mean root?",
    ),
    (
        with_line("data", "data: {dataset: digits, partition: idd}"),
        "data.partition = idd: must be",
        "Did you mean iid?",
    ),
    (
        with_line("data", "data: {dataset: digits, partition: iid, download: yes}"),
        "data.download = yes: must be true or false",
    ),
    (
        with_line("data", "data: {dataset: digits, partition: iid, augment: [flip, erasse]}"),
        "data.augment = ",
        "auto, none or a list, each item crop, crop_mean, flip, rotate or erase",
    ),
    (
        with_line("data", "data: {dataset: digits, partition: iid, augment: [flip, flip]}"),
        "data.augment = ['flip', 'flip']: each transform works once",
    ),
    (with_line("model", "model: 8"), "model = 8: must be resnet8,"),
    (with_line("model", "model: [resnet8]"), 'model = ["resnet8"]: must be resnet8,'),
    (
        with_line("model", "model: {name: resnet9}"),
        "model.name = resnet9: must be",
        "or torchvision:<model> or <module>:<callable>",
    ),
    (with_line("model", "model: 'torchvision:'"), "model = torchvision:: must be"),
    (
        with_line("model", "model: {name: cnn, widht: 3}"),
        "model.widht = 3: cnn has no such",
        "Did you mean width?",
    ),
    (with_line("model", "model: {name: cnn, width: 3.5}"), "model.width = 3.5: must be an integer"),
    (
        with_line("model", "model: {name: resnet8, width: 3}"),
        "model.width = 3: resnet8 has no such field; it has weights",
    ),
    (
        with_line("model", "model: {name: a.b:c, x: .nan}"),
        "model.x = NaN: must be plain finite data",
    ),
    (
        with_line("algorithm", "algorithm: fedlorra"),
        "algorithm = fedlorra: must be",
        "Did you mean fedlora?",
    ),
    (
        with_line("algorithm", "algorithm: {lora_epochs: 2}"),
        "algorithm.name: must be given: ",
        "or <module>:<Class>",
    ),
    (
        with_line("algorithm", "algorithm: no_such_module:X"),
        "algorithm.name = no_such_module:X: ",
        "No module",
    ),
    (
        with_line("algorithm", "algorithm: json:loads"),
        "algorithm.name = json:loads: is not a subclass",
    ),
    (
        with_line("algorithm", "algorithm: {name: fedlora, conv_rate: 0.6}"),
        "algorithm.conv_rate = 0.6: fedlora has no such field; it has ",
        "Did you mean conv_rank?",
    ),
    (
        with_line("algorithm", "algorithm: {name: fedlora, conv_rank: 0}"),
        "algorithm.conv_rank = 0.0: must be",
    ),
    (
        with_line("algorithm", "algorithm: {name: fedlora, lora_epochs: 1.0}"),
        "lora_epochs = 1.0: must be an integer",
    ),
    (
        with_line("algorithm", "algorithm: {name: fedlora, lora_epochs: true}"),
        "lora_epochs = true: must be an integer",
    ),
    (
        with_line("algorithm", "algorithm: {name: fedlora, linear_rank: big}"),
        "linear_rank = big: must be a number",
    ),
    (
        with_line("algorithm", "algorithm: {name: fedlora, rank_rule: offical}"),
        "algorithm.rank_rule = offical: must be paper or official. Did you mean official?",
    ),
    (
        with_line("algorithm", "algorithm: {name: fedlora, layers: conv1}"),
        "layers = conv1: must be a list, each item text",
    ),
    (
        with_line("algorithm", "algorithm: {name: fedlora, layers: [1]}"),
        "layers = [1]: must be a list, each item text",
    ),
    (with_line("train", "train:"), "train = null: must be a block with epochs, batch_size"),
    (with_line("train", "train: 5"), "train = 5: must be a block with epochs, batch_size"),
    (with_line("train", "train: {lr: fast}"), "train.lr = fast: must be a number"),
    (with_line("train", "train: {lr: '0.1'}"), 'train.lr = "0.1": must be a number'),
    (with_line("train", "train: {lr: .inf}"), "train.lr = Infinity: must be a number"),
    (with_line("train", "train: {lr: 1e400}"), "train.lr = Infinity: must be a number"),
    (with_line("train", "train: {lr: -1}"), "train.lr = -1.0: must be a number above 0"),
    (with_line("train", "train: {epochs: 010}"), 'train.epochs = "010": must be an integer'),
    (with_line("train", "train: {epochs: 1:30}"), 'train.epochs = "1:30": must be an integer'),
    (with_line("train", "train: {epochs: null}"), "train.epochs = null: must be an integer"),
    (
        with_line("train", "train: {epochs: 2020-01-01}"),
        'train.epochs = "2020-01-01": must be an integer',
    ),
    (
        with_line("train", "trian: {lr: 0.1}"),
        "trian = {",
        "the config has no such field; it has seed,",
        "mean train?",
    ),
    (with_line("", "train.lr: 0.1"), "train.lr = 0.1: the config has no such field"),
    (with_line("", "engine: {device: gpu}"), "engine.device = gpu: must be auto, cpu or cuda"),
    (
        with_line("", "engine: {group_size: 0}"),
        "engine.group_size = 0: must be an integer of at least 1, or auto",
    ),
    (
        with_line("", "engine: {group_size: most}"),
        "engine.group_size = most: must be an integer or auto",
    ),
    (with_line("", "engine: {threads: 0}"), "engine.threads = 0: must be an integer of at least 1"),
    (with_line("", "evaluate: {every: 0}"), "evaluate.every = 0: must be an integer of at least 1"),
    (
        with_line("", "checkpoint: {keep: 0}"),
        "checkpoint.keep = 0: must be an integer of at least 1",
    ),
    (
        with_line("", "participation: 0"),
        "participation = 0.0: must be a number above 0 and at most 1",
    ),
    (
        with_line("", "participation: 1.5"),
        "participation = 1.5: must be a number above 0 and at most 1",
    ),
    (with_line("rounds", "rounds: 0"), "rounds = 0: must be an integer of at least 1"),
    (with_line("", "seed: -1"), "seed = -1: must be an integer of at least 0"),
    (with_line("", "reduce: exat"), "reduce = exat: must be exact or fast. Did you mean exact?"),
    (with_line("", "server_hosts_clients: on"), "server_hosts_clients = on: must be true or false"),
    (
        with_line("", "output: runs/{nmae}"),
        "output = runs/{nmae}: {nmae} is unknown; there are {name}, {algorithm}, {seed}",
    ),
    (with_line("", "output: ''"), "output = '': must be the name of a folder"),
    (with_line("", "base: nope.yaml"), "base = nope.yaml: must be a YAML file"),
    (with_line("", "base: 3"), "base = 3: must be a YAML file"),
    (with_line("", "base: x.yaml"), "base = x.yaml: this base has a base itself"),
    (with_line("", '"two\\nlines": 1'), "two lines = 1: the config has no such field"),
]


@pytest.mark.parametrize("text, expected", [(text, expected) for text, *expected in BAD_FILES])
def test_a_mistake_in_a_file_is_one_line_that_names_it(write, text, expected):
    path = write(text)
    message = refused(path)
    assert message.startswith(f"{path}: ")
    for fragment in expected:
        assert fragment in message


BAD_OVERRIDES = [
    (["train.lr"], "train.lr: must be key=value"),
    (["=3"], "=3: must be key=value"),
    (["train..lr=3"], "train..lr=3: must be key=value"),
    (["train.lr=[1"], "train.lr=[1: line 1, column 3: expected"),
    (["train.lr="], "train.lr = null: must be a number"),
    (["train.lr=fast"], "train.lr = fast: must be a number"),
    (["train.lr=-1"], "train.lr = -1.0: must be a number above 0"),
    (["train.lr.x=1"], 'train.lr = {"x": 1}: must be a number'),
    (["train=3"], "train = 3: must be a block with epochs"),
    (["trian.lr=1"], "trian = {", "Did you mean train?"),
    (["algorithm=fedlorra"], "algorithm.name = fedlorra: must be", "Did you mean fedlora?"),
    (["algorithm.name=fedlorra"], "algorithm.name = fedlorra: must be", "Did you mean fedlora?"),
    (["algorithm.weights=samples"], "algorithm.weights = samples: fedlora has no such field"),
    (
        ["algorithm.lora_epochs=3", "algorithm=fedavg"],
        "algorithm.lora_epochs = 3: fedavg has no such field",
    ),
    (
        ["data.partition.kind=iid", "data.partition.alpha=1.0"],
        "data.partition.alpha = 1.0: iid has no such field",
    ),
    (["data.partition.clients=0"], "data.partition.clients = 0: must be"),
    (["model={}"], "model.name: must be given"),
    (["model={}", "model.width=3"], "model.name: must be given"),
    (["output=runs/{nme}"], "output = runs/{nme}: {nme} is unknown; there are {name}"),
    (["base=x.yaml"], "base = x.yaml: the config has no such field"),
]


@pytest.mark.parametrize(
    "overrides, expected", [(overrides, expected) for overrides, *expected in BAD_OVERRIDES]
)
def test_a_mistake_in_an_override_names_the_command_line(write, overrides, expected):
    message = refused(write(GOOD), overrides)
    assert message.startswith("command line: ")
    for fragment in expected:
        assert fragment in message


def refused(path: Path, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, overrides)
    (message,) = str(caught.value).splitlines()
    return message


def test_what_cannot_be_opened_is_said_so(write, tmp_path):
    assert "nope.yaml: cannot be read: No such file or directory" in refused(tmp_path / "nope.yaml")
    assert refused(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    (tmp_path / "x.yaml").write_bytes(b"seed: \xff")
    assert "is no YAML: byte 6 is not UTF-8" in refused(tmp_path / "x.yaml")


def test_a_file_gives_values_and_the_rest_are_defaults(write):
    config = read(write(GOOD))
    assert (config.rounds, config.seed, config.reduce) == (7, 1, "exact")
    assert (config.train.epochs, config.train.lr, config.train.momentum) == (2, 0.001, 0.9)
    assert (config.algorithm.lora_epochs, config.algorithm.conv_rank) == (1, 0.6)
    assert (config.data.partition.clients, config.data.partition.alpha) == (6, 0.1)
    assert config.data.source.dataset == "cifar10"
    (network,) = config.model.mix
    assert (network.name, dict(network.options)) == ("resnet8", {})
    assert config.output == "runs/x"


def test_the_output_folder_is_named_by_placeholders(write):
    path = write(GOOD + "output: out/{name}-{algorithm}-{seed}\n", "table1.yaml")
    assert read(path, ["seed=3", "algorithm=fedavg"]).output == "out/table1-fedavg-3"


def test_numbers_keep_their_kind(write):
    config = read(
        write(GOOD),
        ["train.lr=1", "algorithm.linear_rank=1", "model={name: a.b:c, n: 1, x: 1.0, on: off}"],
    )
    assert type(config.train.lr) is float
    assert type(config.algorithm.linear_rank) is int
    assert resolved_dict(config)["model"] == {"name": "a.b:c", "n": 1, "x": 1.0, "on": "off"}


@pytest.mark.parametrize(
    "number, lr", [("1e-3", 0.001), ("1E2", 100.0), (".5", 0.5), ("1.", 1.0), ("+2.5e+1", 25.0)]
)
def test_every_form_of_a_number_is_read(write, number, lr):
    assert read(write(GOOD), [f"train.lr={number}"]).train.lr == lr


def test_an_override_sets_one_field(write):
    base, changed = read(write(GOOD)), read(write(GOOD), ["algorithm.conv_rank=0.5"])
    assert changed == dataclasses.replace(
        base, algorithm=dataclasses.replace(base.algorithm, conv_rank=0.5)
    )


def test_a_field_joins_a_bare_name(write):
    assert (
        dict(read(write(with_line("model", "model: cnn")), ["model.width=4"]).model.mix[0].options)[
            "width"
        ]
        == 4
    )
    path = write(with_line("algorithm", "algorithm: fedlorra"))
    assert refused(path, ["algorithm.conv_rank=0.5"]).startswith(
        f"{path}: algorithm.name = fedlorra"
    )


@pytest.mark.parametrize(
    "override", ["algorithm=fedlora", "algorithm.name=fedlora", "algorithm={name: fedlora}"]
)
def test_the_same_choice_keeps_the_block(write, override):
    config = read(write(GOOD), [override])
    assert config == read(write(GOOD)) and config.algorithm.lora_epochs == 1
    assert not config.resets


def test_a_block_given_as_empty_brings_the_defaults_back(write):
    assert read(write(GOOD), ["algorithm={}", "algorithm.name=fedlora"]).algorithm.lora_epochs == 2


def test_another_choice_keeps_what_means_the_same_and_tells_the_rest(write):
    write(GOOD, "base.yaml")
    text = "base: base.yaml\ndata: {partition: {kind: dirichlet_class, clients: 7, seed: 9, alpha: 0.7}}\n"
    path = write(text, "child.yaml")
    config = read(path, ["data.partition.kind=iid"])
    partition = config.data.partition
    assert (type(partition).__name__, partition.clients, partition.seed) == ("Iid", 7, 9)
    (line,) = config.resets
    assert line == (
        f"data.partition.kind = iid (command line) resets data.partition.alpha = 0.7 ({path})"
    )


@pytest.mark.parametrize(
    "old, new, kept, reset",
    [
        (
            "fedlora, conv_rank: 0.3, bn_stats: local",
            "fedavg_lora",
            {"conv_rank": 0.3},
            ["bn_stats"],
        ),
        ("fedit, lora_ranks: [3], alpha: 2.0", "fedhl", {"lora_ranks": (3,), "alpha": 2.0}, []),
        ("fedprox, mu: 0.5, weights: uniform", "moon", {"weights": "uniform"}, ["mu"]),
        ("apfl, alpha: 0.3", "fedit", {"alpha": 16.0}, ["alpha"]),
    ],
)
def test_a_field_is_kept_if_both_methods_have_it_from_one_class(write, old, new, kept, reset):
    config = read(
        write(with_line("algorithm", f"algorithm: {{name: {old}}}")), [f"algorithm={new}"]
    )
    assert {name: getattr(config.algorithm, name) for name in kept} == kept
    told = " ".join(config.resets)
    assert len(config.resets) == bool(reset) and told.count("algorithm.") == len(reset) + bool(
        reset
    )
    assert all(f"algorithm.{name} = " in told for name in reset)


def test_a_key_that_is_written_again_is_not_told(write):
    path = write(with_line("algorithm", "algorithm: {name: fedprox, mu: 0.5}"))
    config = read(path, ["algorithm=moon", "algorithm.mu=0.5"])
    assert config.algorithm.mu == 0.5 and not config.resets


@pytest.mark.parametrize(
    "override", ["algorithm=fedavg", "algorithm.name=fedavg", "algorithm={name: fedavg}"]
)
def test_an_override_replaces_a_block(write, override):
    assert resolved_dict(read(write(GOOD), [override]))["algorithm"] == {
        "name": "fedavg",
        "weights": "samples",
        "absent": "exclude",
    }


def test_the_order_of_overrides_does_not_matter(write):
    overrides = ["algorithm.weights=uniform", "algorithm=fedavg", "model.width=4", "model.name=cnn"]
    config = read(write(GOOD), overrides)
    assert config == read(write(GOOD), overrides[::-1])
    assert config.algorithm.weights == "uniform"
    assert dict(config.model.mix[0].options) == {"width": 4, "hidden": 64}


def test_a_file_wins_over_its_base_key_by_key(write):
    write(GOOD, "base.yaml")
    config = read(write("base: base.yaml\ntrain: {lr: 0.5}\nalgorithm: {conv_rank: 0.3}\n"))
    assert (config.train.lr, config.train.epochs) == (0.5, 2)
    assert (config.algorithm.conv_rank, config.algorithm.lora_epochs) == (0.3, 1)
    assert config.output == "runs/x"


def test_a_new_selector_drops_what_the_base_says_about_the_old_one(write, tmp_path):
    write(GOOD, "base.yaml")
    text = "base: base.yaml\nalgorithm: {name: fedavg}\nmodel: {name: cnn}\n"
    config = read(write(text + "data: {partition: {kind: pathological}}\n"))
    assert "lora_epochs" not in resolved_dict(config)["algorithm"]
    assert config.data.partition.clients == read(tmp_path / "base.yaml").data.partition.clients
    assert config.data.source.dataset == "cifar10"


def test_a_base_without_a_selector_is_kept(write):
    write(with_line("algorithm", "algorithm: {lora_epochs: 1}"), "base.yaml")
    assert read(write("base: base.yaml\nalgorithm: {name: fedlora}")).algorithm.lora_epochs == 1


def test_a_mistake_is_told_of_the_file_that_made_it(write, tmp_path):
    write(with_line("train", "train: {lr: fast}"), "base.yaml")
    path = write("base: base.yaml\ntrain: {epochs: many}")
    assert refused(path).startswith(f"{path}: train.epochs = many")
    assert refused(path, ["train.epochs=1"]).startswith(
        f"{tmp_path / 'base.yaml'}: train.lr = fast"
    )


def test_an_algorithm_of_ones_own_is_named_by_its_module(write, tmp_path, monkeypatch):
    (tmp_path / "mine_cfg.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedlora_mpi.algorithms.fedavg import FedAvg\n"
        "@dataclass(frozen=True)\n"
        "class Mine(FedAvg):\n"
        "    mu: float = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = write(with_line("algorithm", "algorithm: {name: mine_cfg:Mine, weights: uniform}"))
    config = read(path)
    assert resolved_dict(config)["algorithm"]["name"] == "mine_cfg:Mine"
    assert (config.algorithm.weights, type(config.algorithm.mu)) == ("uniform", float)
    assert read(write(resolved_yaml(config))) == config
    assert "mine_cfg:Mine has no such field" in refused(path, ["algorithm.nu=1"])


ROUND_TRIPS = [
    [],
    ["algorithm=fedavg", "model=cifar_resnet8"],
    ["algorithm=local", "data.partition=pathological", "participation=1"],
    ["model={name: 'torchvision:resnet18', zero_init_residual: true, width_per_group: 32}"],
    [
        "model={name: a.b:c, a: 'on', b: '1e-3', c: '010', d: '2020-01-01', e: null, f: [1, {x: .5}], g: ''}"
    ],
    ["train.lr=1e-9", "train.weight_decay=5e-4", "engine.group_size=8"],
    ["output='out, {seed}: #1'"],
    ["output=out/é"],
    ["algorithm=dpsgd", "topology=ring"],
    ["algorithm=dpsgd", "topology={name: random, probability: 0.5}"],
]


@pytest.mark.parametrize("overrides", ROUND_TRIPS)
def test_the_resolved_config_reads_back_equal(write, overrides):
    check_round_trip(read(write(GOOD), overrides), write)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_of_the_repository_reads_back_equal(path, write):
    check_round_trip(read(path), write)


def check_round_trip(config, write):
    tree = resolved_dict(config)
    assert from_dict(tree, "there.yaml") == config
    assert from_dict(json.loads(json.dumps(tree)), "there.yaml") == config
    again = read(write(resolved_yaml(config), "there.yaml"))
    assert again == config
    assert digest(again) == digest(config)
    optional = {"faults", "log", "privacy", "topology"}  # left out where they are the defaults
    names = [f.name for f in dataclasses.fields(config) if f.name != "resets"]
    assert [n for n in names if n in tree] == list(tree) and {*names} - {*tree} <= optional


@pytest.mark.parametrize(
    "override", ["rounds=9", "output=o", "checkpoint.every=3", "data.root=/d", "data.download=true"]
)
def test_the_digest_ignores_what_a_resume_may_change(write, override):
    assert digest(read(write(GOOD), [override])) == digest(read(write(GOOD)))


@pytest.mark.parametrize(
    "override",
    [
        "seed=2",
        "train.lr=0.2",
        "algorithm.conv_rank=0.5",
        "engine.device=cpu",
        "data.partition.alpha=0.2",
    ],
)
def test_the_digest_sees_what_changes_the_numbers(write, override):
    assert digest(read(write(GOOD), [override])) != digest(read(write(GOOD)))


TINY = Path(__file__).parent / "tiny.yaml"
# Resolved blocks of an earlier version, and the digests of tests/tiny.yaml with them then.
FORMER_FEDAMP = {
    "name": "fedamp", "lam": 1.0, "alpha": 10000.0, "decay": 0.1, "decay_every": 30,
    "alpha_min": 0.05, "sigma": 100.0, "convex": True, "heuristic": False, "self_weight": 0.0,
    "start": "own",
}  # fmt: skip
FORMER_FEDHL = {
    "name": "fedhl", "lora_ranks": [8], "rank_shares": [], "capacities": [], "alpha": 16.0,
    "scale": "rank", "layers": ["*"], "full": ["head"], "judged": "client", "diagnose": False,
    "weight_mode": "paper", "eps": 1e-06, "eps_relative": 0.0, "per_layer": False,
}  # fmt: skip
FORMER_BLOCKS = {
    "7434b58bd79bc6c7b4995d90f23cc64e": (
        FORMER_FEDAMP, {"convex": True, "cloud_alpha": "previous"},
    ),
    "3b42cc2075a39ee947fc184b66de9bfd": (FORMER_FEDHL, {"weight_mode": "fedhera"}),
    "c86a02f068e807db1a640314c3514a30": (
        FORMER_FEDHL | {"weight_mode": "both", "eps": 0.5},
        {"weight_mode": "fedhera_samples", "eps": 0.5},
    ),
    "8b8cc79140b851c32f592181c5186dd3": (
        {"name": "ditto", "weights": "samples", "absent": "exclude", "lam": 1.0},
        {"weights": "samples"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("former", FORMER_BLOCKS)
def test_a_recorded_config_of_before_keeps_its_meaning_and_its_digest(former, write):
    block, meaning = FORMER_BLOCKS[former]
    tree = resolved_dict(read(TINY)) | {"algorithm": block}
    config = from_recorded(tree, "run")
    assert {name: getattr(config.algorithm, name) for name in meaning} == meaning
    assert digest(config) == former
    assert read_recorded(write(json.dumps(tree))) == config
    again = read_recorded(write(checksummed_yaml(config)))  # as a resume writes it into the log
    assert again == config and digest(again) == former


@pytest.mark.parametrize(
    "block, replacements",
    [
        (
            "{name: fedamp, convex: true, cloud_alpha: previous, decay_every: 1, alpha: 30.0}",
            {"  cloud_alpha: previous\n": ""},
        ),
        (
            "{name: fedhl, weight_mode: fedhera, lora_ranks: [1, 2], alpha: 2.0}",
            {"  tau: 0.3\n": "", "fedhera": "paper"},
        ),
    ],
)
def test_a_run_of_before_resumes_as_it_began(block, replacements, call, tmp_path):
    settings = (f"algorithm={block}", "train.lr=0.02", "train.epochs=1")
    for name, rounds in (("whole", 2), ("begun", 1)):
        assert call("run", TINY, *settings, f"rounds={rounds}", f"output={name}")[0] == 0
    file = tmp_path / "begun" / "config.yaml"
    text = file.read_text().partition("\n")[2]  # without its checksum
    for now, former in replacements.items():
        assert text.count(now) == 1
        text = text.replace(now, former)
    file.write_text(text)
    code, _, err = call("resume", "begun", "rounds=2")
    assert code == 0, err
    lines = call("digest", "whole", "begun")[1].splitlines()
    assert len({line.partition(" ")[2] for line in lines}) == 1


def test_a_new_config_has_the_new_defaults_and_another_digest():
    for name, former in (
        ("fedamp", "7434b58bd79bc6c7b4995d90f23cc64e"),
        ("fedhl", "3b42cc2075a39ee947fc184b66de9bfd"),
        ("ditto", "8b8cc79140b851c32f592181c5186dd3"),
    ):
        config = read(TINY, [f"algorithm={name}"])
        assert digest(config) != former
    fedamp, fedhl, ditto = (
        read(TINY, [f"algorithm={name}"]).algorithm for name in ("fedamp", "fedhl", "ditto")
    )
    assert (fedamp.convex, fedamp.cloud_alpha) == (False, "current")
    assert (fedhl.weight_mode, fedhl.tau, ditto.weights) == ("drift", 0.3, "uniform")


def test_a_config_may_have_the_former_name_of_a_value(write):
    for former, now in (("paper", "fedhera"), ("both", "fedhera_samples")):
        config = read(TINY, [f"algorithm={{name: fedhl, weight_mode: {former}}}"])
        assert config.algorithm.weight_mode == now
        assert f"weight_mode: {now}" in resolved_yaml(config)
    with pytest.raises(ConfigError, match="must be drift, samples, uniform, inverse, fedhera or"):
        read(TINY, ["algorithm={name: fedhl, weight_mode: steep}"])


def test_former_values_are_values_that_the_methods_have():
    for name, keys in VALUES_BEFORE_KEYS.items():
        fields = {f.name: f for f in dataclasses.fields(find_algorithm(name))}
        assert keys.keys() <= fields.keys()
        assert find_algorithm(name)(**keys)
    for name, keys in RENAMED_VALUES.items():
        for key, values in keys.items():
            for former, now in values.items():
                read(TINY, [f"algorithm={{name: {name}, {key}: {now}}}"])
                assert former not in get_args(get_type_hints(find_algorithm(name))[key])


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 3


@dataclasses.dataclass(frozen=True)
class Outer:
    needed: bool
    inner: Inner | None = None
    sizes: tuple[float, ...] = (1, 2)
    ratio: int | Literal["auto"] | None = "auto"
    label: str = ""
    anything: Any = None


def test_a_block_is_built_from_annotations():
    outer = build_block(
        Outer,
        {"needed": True, "inner": {"size": 4}, "sizes": [1], "ratio": None},
        "outer",
        Origin("f"),
    )
    assert outer == Outer(True, Inner(4), (1.0,), None)
    assert build_block(Outer, {"needed": False}, "outer", Origin("f")) == Outer(
        False, None, (1.0, 2.0)
    )


@pytest.mark.parametrize(
    "block, message",
    [
        ({}, "f: o.needed: must be given"),
        ({"needed": 1}, "f: o.needed = 1: must be true or false"),
        ({"needed": True, "inner": 3}, "f: o.inner = 3: must be a block with size or null"),
        (
            {"needed": True, "inner": {"sise": 3}},
            "f: o.inner.sise = 3: o.inner has no such field; it has size",
        ),
        (
            {"needed": True, "sizes": [1, "x"]},
            'f: o.sizes = [1, "x"]: must be a list, each item a number',
        ),
        (
            {"needed": True, "ratio": "aoto"},
            "f: o.ratio = aoto: must be an integer, auto or null. Did you mean auto?",
        ),
        ({"needed": True, "label": 3}, "f: o.label = 3: must be text"),
        ({"needed": True, 3: 3}, "f: o.3 = 3: o has no such field"),
        (
            {"needed": True, "anything": {3: 3}},
            'f: o.anything = {"3": 3}: must be plain finite data',
        ),
        (
            {"needed": True, "label": ["a" * 99]},
            "f: o.label = " + '["' + "a" * 55 + "...: must be text",
        ),
    ],
)
def test_a_block_refuses_what_its_annotations_do_not_take(block, message):
    with pytest.raises(ConfigError) as caught:
        build_block(Outer, block, "o", Origin("f"))
    assert str(caught.value).startswith(message)


def test_the_annotated_config_is_the_config_with_the_origin_of_every_key(write):
    write(GOOD, "base.yaml")
    path = write(
        "base: base.yaml\n# a comment\ntrain: {lr: 0.5}\nalgorithm: fedavg\n", "child.yaml"
    )
    text = annotated_yaml(path, ["train.epochs=3", "rounds=2"])
    assert read(write(text, "again.yaml")) == read(path, ["train.epochs=3", "rounds=2"])
    origin = {
        line.split("#")[0].split(":")[0].strip(): line.split("# ")[1]
        for line in text.splitlines()
        if "#" in line
    }
    assert origin["lr"] == f"{path}:3" and origin["epochs"] == origin["rounds"] == "command line"
    assert origin["name"] == f"{path}:4" and origin["weights"] == "default"
    base = path.with_name("base.yaml")
    assert origin["alpha"] == f"{base}:2" and origin["seed"] == "default"


@pytest.mark.parametrize("model", ["cnn", "{mix: [{name: cnn}, {name: cnn5}], clients: [2, 3]}"])
def test_the_annotated_config_has_the_keys_that_a_run_records_only_if_set(write, model):
    options = ["data.partition.clients=5", f"model={model}"]
    path = write(GOOD)
    text = annotated_yaml(path, options)
    again = write(text, "again.yaml")
    assert read(again) == read(path, options)
    flat = " ".join(text.split())
    for words in (
        "loss: cross_entropy # default", "head: null", "weights: null", "compile: false # default",
        "personal: memory # default", "graphs: auto # default", "metrics: [] # default",
        "tolerate: false # default", "csv: false # default", "clip: null # default",
        "tasks: null # default", "tokenizer: null # default", "path: null # default",
    ):  # fmt: skip
        assert words in flat, words
    assert "compile" not in resolved_yaml(read(again))


def test_an_explained_config_says_what_the_settings_of_the_method_mean(write):
    path = write(with_line("algorithm", "algorithm: fedprox"))
    text = annotated_yaml(path, explain=True)
    assert read(write(text, "again.yaml")) == read(path)
    added = [line for line in text.splitlines() if line not in annotated_yaml(path).splitlines()]
    assert all(line.startswith("  # ") for line in added)
    words = " ".join(line.removeprefix("  # ") for line in added)
    assert (
        "weight of the proximal term; 0: FedAvg. Allowed: a number of at least 0 [1]. Default: "
        "0.01 (our choice from the grid that the paper tunes, 0.001 to 1)" in words
    )


def test_resets_are_recorded_with_a_run_and_read_back(write):
    path = write(with_line("algorithm", "algorithm: {name: fedprox, mu: 0.5}"))
    config = read(path, ["algorithm=moon"])
    recorded = write(checksummed_yaml(config), "config.yaml")
    assert read_recorded(recorded).resets == config.resets and len(config.resets) == 1
    assert read_recorded(recorded) == config
