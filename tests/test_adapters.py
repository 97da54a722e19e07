"""Adapters of peft: what a run exports, what a network starts from, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from causal import save_tokenizer, small_model
from methods import CAUSAL_METHODS, GPT, LORA_METHODS, WORDS
from runs import TINY, assert_same_run, create_run, trees_equal
from tiers import thorough_param

from fedlora_mpi import algorithms, open_run
from fedlora_mpi.algorithm import Variables
from fedlora_mpi.analysis.peft import adapter_content, export_adapter
from fedlora_mpi.components.lowrank import as_weight
from fedlora_mpi.config import read, resolved_dict
from fedlora_mpi.config.blocks import ConfigError
from fedlora_mpi.core.names import factor_name, factors_by_weight
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.loop import resume
from fedlora_mpi.models import weights, zoo
from fedlora_mpi.models.network import Model
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import Refusal

pytest.importorskip("safetensors")

OPTIONS = {"width": 8, "heads": 2, "layers": 1, "feedforward": 12}
LAYERS = "layers: ['*.query.weight', '*.up.weight']"
SHAPES = {"blocks.0.query": (8, 8), "blocks.0.up": (12, 8)}
PREFIX = "base_model.model."


def tensors(rank: int = 3, **more) -> dict[str, torch.Tensor]:
    """The tensors of an adapter of the tiny GPT."""
    tree = {}
    for module, (out_side, in_side) in SHAPES.items():
        for letter, shape in (("A", (rank, in_side)), ("B", (out_side, rank))):
            tree[f"{module}.lora_{letter}.weight"] = torch.randn(*shape, generator=rng(1, module))
    tree = {PREFIX + name: v for name, v in (tree | more).items()}
    return {name: v for name, v in tree.items() if v is not None}


def write_adapter(folder: Path, tree: dict[str, torch.Tensor], **settings) -> Path:
    """An adapter's folder; s is 2 unless ``settings`` say another."""
    folder.mkdir()
    given = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "init_lora_weights": True} | settings
    (folder / "adapter_config.json").write_text(json.dumps(given))
    (folder / "adapter_model.safetensors").write_bytes(weights.pack_safetensors(tree))
    return folder


def gpt(adapter: Path | None = None, **options) -> Model:
    given = {**OPTIONS, **options}
    return zoo.build("gpt", given, 11, (6,), 1, 11, positions=6, adapter=adapter and str(adapter))


def adapted_weights(model: Model) -> dict[str, torch.Tensor]:
    """The leaves W_0 + s B A of the network's adapter."""
    pairs = model.adapter.factors.items()
    return model.all_values | {n: model.all_values[n] + s * B @ A for n, (A, B, s) in pairs}


# Read


@pytest.mark.parametrize(
    "settings, s",
    [
        ({}, {"query": 2, "up": 2}),
        ({"use_rslora": True}, {"query": 6 / 3**0.5, "up": 6 / 3**0.5}),
        ({"alpha_pattern": {"up": 3}}, {"query": 2, "up": 1}),
        ({"alpha_pattern": {r"blocks\.\d+\.up": 3, ".*": 9}}, {"query": 3, "up": 1}),
        ({"r": 7, "rank_pattern": {"query": 3, "blocks.0.up": 3}}, {"query": 2, "up": 2}),
    ],
)
def test_the_scale_is_that_of_peft(tmp_path, settings, s):
    tree = tensors()
    model = gpt(write_adapter(tmp_path / "a", tree, **settings))
    assert model.adapter.factors.keys() == {f"{module}.weight" for module in SHAPES}
    for name, (A, B, scale) in model.adapter.factors.items():
        module = name.removesuffix(".weight")
        assert torch.equal(A, tree[f"{PREFIX}{module}.lora_A.weight"])
        assert torch.equal(B, tree[f"{PREFIX}{module}.lora_B.weight"])
        assert scale == pytest.approx(s[module.rpartition(".")[2]], rel=1e-12)
    assert trees_equal(model.initial, gpt().initial) and not model.adapter.whole


def test_modules_that_were_saved_whole_replace_those_of_the_network(tmp_path):
    whole = {"norm.weight": torch.full((8,), 2.0), "head.weight": torch.ones(11, 8)}
    whole |= {"blocks.0.up.base_layer.bias": torch.ones(12)}
    model, plain = gpt(write_adapter(tmp_path / "a", tensors(**whole)), tied=False), gpt(tied=False)
    whole["blocks.0.up.bias"] = whole.pop("blocks.0.up.base_layer.bias")
    assert trees_equal(model.initial, plain.initial | whole) and model.adapter.whole == whole.keys()
    tied = tensors(**{"head.weight": gpt().initial["words.weight"]})
    same = gpt(write_adapter(tmp_path / "b", tied))
    assert trees_equal(same.initial, gpt().initial) and not same.adapter.whole


CONFIG_MISTAKES = [
    ({"peft_type": "IA3"}, "adapter_config.json: peft_type = IA3: must be LORA"),
    ({"use_dora": True}, "adapter_config.json: use_dora: only plain LoRA is read"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa: changes the network's own"),
    ({"r": 4}, "blocks.0.*.weight: has rank 3, in adapter_config.json 4"),
    ({"lora_alpha": None}, "adapter_config.json: lora_alpha = None: must be a number"),
    ({"lora_alpha": True}, "adapter_config.json: lora_alpha = True: must be a number"),
    ({"alpha_pattern": {"(": 3}}, "adapter_config.json: alpha_pattern must be a mapping"),
    ({"rank_pattern": [3]}, "adapter_config.json: rank_pattern must be a mapping"),
]
QUERY = "blocks.0.query"
TENSOR_MISTAKES = [
    (tensors() | {"a.lora_A.weight": torch.ones(3, 8)}, "a.lora_A.weight is no name of peft"),
    (tensors(**{"words.lora_embedding_A": torch.ones(3, 11)}), "of low-rank parts only lora_A"),
    (tensors(**{f"{QUERY}.lora_B.bias": torch.ones(8)}), "of low-rank parts only lora_A.weight"),
    (tensors(**{"query.lora_A.weight": torch.ones(3, 8)}), "query.weight is adapted, but absent"),
    (tensors(**{"norm.lora_A.weight": torch.ones(3, 8)}), "it is of a normalisation layer"),
    (tensors(**{"places.lora_A.weight": torch.ones(3, 8)}), "it is an embedding, a table of rows"),
    (tensors(**{"head.lora_A.weight": torch.ones(3, 8)}), "are tied, one weight in two places"),
    (tensors(**{"words.lora_A.weight": torch.ones(3, 8)}), "are tied, one weight in two places"),
    (tensors(**{f"{QUERY}.lora_B.weight": None}), r"lora_A \[3, 8\] and lora_B \[0\] must be"),
    (tensors(**{f"{QUERY}.lora_A.weight": torch.ones(3, 9)}), r"must be \[r, 8\] and \[8, r\]"),
    (tensors(9), "has rank 9, above its shorter side 8"),
    (tensors(**{"norm.weight": torch.full((8,), torch.nan)}), "has numbers that are not finite"),
    (tensors(**{"norm.weight": torch.ones(9)}), r"norm.weight is \[9\] in the file, \[8\] in the"),
    (tensors(**{"score.weight": torch.ones(2)}), r"score.weight is \[2\] in the file, absent in"),
    (tensors(**{"head.weight": torch.ones(11, 8)}), "head.weight: is tied in the network, and"),
    ({f"{PREFIX}norm.weight": torch.ones(8)}, "adapter_model.safetensors holds no low-rank part"),
]


@pytest.mark.parametrize(
    "tree, settings, said",
    [(tensors(), settings, said) for settings, said in CONFIG_MISTAKES]
    + [(tree, {}, said) for tree, said in TENSOR_MISTAKES],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, tree, settings, said):
    folder = write_adapter(tmp_path / "a", tree, **settings)
    with pytest.raises(ValueError, match=f"^adapter = {re.escape(str(folder))}: .*{said}") as error:
        gpt(folder)
    assert "\n" not in str(error.value)


def test_files_that_are_none_are_refused(tmp_path):
    folder = tmp_path / "a"
    for name, content, said in (
        ("", b"", "there is no file .*a/adapter_config.json"),
        ("adapter_config.json", b"{", "adapter_config.json is no JSON"),
        ("adapter_config.json", b"[]", "adapter_config.json is no JSON object"),
        ("adapter_config.json", b'{"peft_type": "LORA"}', "there is no file .*adapter_model.saf"),
        ("adapter_model.safetensors", b"{}", "is no safetensors file, or damaged"),
    ):
        if name:
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"^adapter = .*a: .*{said}"):
            gpt(folder)


def test_a_network_without_values_has_the_same_adapter(tmp_path):
    scale = {f"{PREFIX}blocks.0.norm1.weight": torch.ones(8)}
    tied = {f"{PREFIX}words.weight": torch.ones(11, 8)}  # its value cannot be compared
    folder = write_adapter(tmp_path / "adapter", tensors() | scale | tied)
    arguments = ("gpt", OPTIONS, 11, (6,), 1, 11)
    model = zoo.build(*arguments, positions=6, adapter=str(folder), shapes_alone=True)
    assert {*model.adapter.factors} == {f"{name}.weight" for name in SHAPES}
    assert model.adapter.whole == {"blocks.0.norm1.weight"}
    assert all(v.is_meta for v in model.initial.values())


# Start


@pytest.mark.parametrize("name", LORA_METHODS)
def test_a_client_with_the_rank_of_the_adapter_starts_from_it(tmp_path, name):
    model = gpt(write_adapter(tmp_path / "a", tensors()))
    method = algorithms.find_algorithm(name)(
        lora_ranks=(5, 3, 1), alpha=7.0, layers=("*.query.*", "*.up.*", "*.value.*"), full=()
    )
    shared = method.init(model, rng(1, "init")).shared
    expected = adapted_weights(model)
    for client in range(2):
        transport = method.transport(client, 3)
        personal = transport.method.init(model, rng(1, "init")).personal
        v = Variables(transport.download(shared), personal)
        tree = transport.method.client_model(model, v)
        for leaf in expected:
            torch.testing.assert_close(tree[leaf], expected[leaf], rtol=1e-5, atol=2e-6)
    assert not torch.equal(tree["blocks.0.up.weight"], model.initial["blocks.0.up.weight"])


def test_further_components_are_as_without_an_adapter(tmp_path):
    model, method = (
        gpt(write_adapter(tmp_path / "a", tensors())),
        algorithms.find_algorithm("fedit"),
    )
    with_it, without = (
        method(lora_ranks=(5,), full=()).init(m, rng(1, "init")).shared for m in (model, gpt())
    )
    for name in model.adapter.factors:
        A, B = (with_it[factor_name(name, letter)] for letter in "AB")
        assert torch.equal(A[3:], without[factor_name(name, "A")][3:]) and A[3:].all()
        assert not B[:, 3:].any() and B[:, :3].any()
    others = without.keys() - {factor_name(n, x) for n in model.adapter.factors for x in "AB"}
    assert others and all(torch.equal(with_it[name], without[name]) for name in others)


def test_a_truncation_of_a_redistributed_start_is_the_best(tmp_path):
    model = gpt(write_adapter(tmp_path / "a", tensors()))
    method = algorithms.find_algorithm("fedhl")(lora_ranks=(4, 2), full=())
    shared = method.init(model, rng(1, "init")).shared
    received = method.transport(1, 2).download(shared)
    products = method.transport(1, 2).method.factor_products(received)
    for name, (A, B, s) in model.adapter.factors.items():
        U, S, V = torch.linalg.svd((s * B @ A).double(), full_matrices=False)
        best = U[:, :2] * S[:2] @ V[:2]
        torch.testing.assert_close(products[name].double(), best, rtol=1e-4, atol=1e-5)
        tail = S.square().flip(0).cumsum(0).flip(0)[:4]
        torch.testing.assert_close(shared[f".tail.{name}"].double()[:4], tail, rtol=1e-4, atol=1e-4)


# Runs


def settings(folder: Path, adapter: Path | None = None, *more: str, method: str = "fedit") -> list:
    """The tiny experiment of words, with clients of ranks 3 and 2."""
    start = [f"model.adapter={adapter}"] if adapter else []
    block = f"algorithm={{name: {method}, lora_ranks: [3, 2], alpha: 6, {LAYERS}, full: []}}"
    return [*GPT, *start, block, "rounds=1", "train.lr=0.02", "train.epochs=1", *more]


def test_an_exported_adapter_starts_a_run_where_the_other_ended(tmp_path):
    run = open_run(create_run(1, tmp_path / "first", *settings(tmp_path)))
    for client, rank in ((0, 3), (1, 2)):
        folder = export_adapter(run, client, tmp_path / str(client))
        overrides = settings(tmp_path, folder, f"algorithm.lora_ranks=[{rank}]")
        overrides.append(f"algorithm.alpha={2 * rank}")
        parts = build(read(TINY, overrides), "x", Solo())
        (kind,) = parts.federation.clients.types
        first = kind.local_initial
        (scores,) = kind.trainer.score_clients([client], first.shared, {}).tolist()
        assert scores[0] == run.array("clients/accuracy")[-1, client]
        assert scores[1] == run.array("clients/loss")[-1, client]
        network, method = kind.trainer.model, kind.transport.method
        again, config = adapter_content(
            network, *method.adapter(network, first), method.client_model(network, first)
        )
        assert trees_equal(again, weights.read(folder / "adapter_model.safetensors"))
        said = json.loads((folder / "adapter_config.json").read_text())
        assert config.items() <= said.items() and said["r"] == rank


def test_a_leaf_that_came_whole_is_exported_whole(tmp_path):
    adapter = write_adapter(tmp_path / "a", tensors(**{"norm.bias": torch.ones(8)}))
    run = open_run(create_run(1, tmp_path / "run", *settings(tmp_path, adapter)))
    folder = export_adapter(run, 0, tmp_path / "b")
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["norm"]
    tree = weights.read(folder / "adapter_model.safetensors")
    assert torch.equal(tree[f"{PREFIX}norm.bias"], torch.ones(8)) and f"{PREFIX}norm.weight" in tree


def test_the_adapter_belongs_to_the_run(tmp_path):
    adapter = write_adapter(tmp_path / "a", tensors())
    whole = create_run(1, tmp_path / "whole", *settings(tmp_path, adapter, "rounds=2"))
    cut = create_run(2, tmp_path / "cut", *settings(tmp_path, adapter, "checkpoint.every=1"))
    file = adapter / "adapter_config.json"
    kept = file.read_text()
    file.write_text(kept.replace('"lora_alpha": 6', '"lora_alpha": 5'))
    with pytest.raises(Refusal, match=r"cut/config.yaml: model.adapter = .*/a: has changed since"):
        resume(cut, ["rounds=2"], Solo())
    file.write_text(kept)
    assert resume(cut, ["rounds=2"], Solo()) == 0
    assert_same_run(whole, cut)
    assert not [*whole.glob("network-*")]
    names = open_run(whole).client(1).weights.keys()
    shutil.move(adapter, tmp_path / "moved")
    with pytest.raises(ValueError, match=r"is in model.adapter = .*/a alone, which is gone; put"):
        open_run(whole).client(1).weights  # noqa: B018
    shutil.move(tmp_path / "moved", adapter)
    assert open_run(whole).client(1).weights.keys() == names


@pytest.mark.parametrize(
    "change, said",
    [
        ("algorithm=fedavg", "model.adapter = .*: fedavg trains no low-rank part beside frozen"),
        ("algorithm.lora_ranks=[2, 1]", "algorithm.lora_ranks = .2, 1.: model.adapter has rank 3"),
        ("algorithm.layers=['*.up.*']", "algorithm.layers = .*: model.adapter has a low-rank part"),
        ("model.adapter=no", "model.adapter = no: there is no file .*/no/adapter_config.json"),
    ],
)
def test_mistakes_of_a_config_are_one_line(tmp_path, change, said):
    adapter = write_adapter(tmp_path / "a", tensors())
    with pytest.raises((Refusal, ConfigError), match=said) as error:
        build(read(TINY, [*settings(tmp_path, adapter), change]), str(TINY), Solo())
    assert "\n" not in str(error.value)


def test_a_config_keeps_the_adapter(tmp_path):
    config = read(TINY, ["model.adapter=a"])
    assert resolved_dict(config)["model"]["adapter"] == "a" and config.model.mix[0].adapter == "a"
    assert "adapter" not in resolved_dict(read(TINY))["model"]


@pytest.mark.parametrize(
    "name", [CAUSAL_METHODS[0], *(thorough_param(name) for name in CAUSAL_METHODS[1:])]
)
def test_lora_methods_tune_a_language_model_alike_on_any_ranks(tmp_path, name):
    adapter = write_adapter(tmp_path / "a", tensors())
    how = settings(tmp_path, adapter, "algorithm.lora_ranks=[3,1,2]", method=name)
    one, *others = (create_run(ranks, tmp_path / str(ranks), *how) for ranks in (1, 2, 3))
    for other in others:
        assert_same_run(one, other)


def test_a_method_that_needs_classes_refuses_a_language_model(tmp_path):
    with pytest.raises(Refusal, match="algorithm.name = fed_talora: needs a class of each sample"):
        build(read(TINY, settings(tmp_path, method="fed_talora")), str(TINY), Solo())


# Hugging Face

TARGETS = {"gpt2": ("c_attn", "c_fc"), "llama": ("q_proj", "v_proj", "up_proj")}


def causal_settings(folder: Path, family: str, *more: str, slices: str = "") -> list[str]:
    """The tiny experiment of words with a model of Hugging Face; ``slices``: those of c_attn that
    have low-rank parts.
    """
    network = small_model(folder, family)
    lines = (TINY.parent / "words/train.csv").read_text().split()
    save_tokenizer(network, sorted({word for line in lines for word in line.split(",")})[:20])
    layers = [f"*.{target}.weight" for target in TARGETS[family]]
    if slices:
        layers = [*(f"*.c_attn.weight:{letter}" for letter in slices), *layers[1:]]
    block = f"algorithm={{name: fedit, lora_ranks: [3, 2], alpha: 5, layers: {layers}, full: []}}"
    return [
        WORDS,
        f"data.text.tokenizer={network}",
        f"model={{name: hf, folder: {network}, loss: next_token}}",
        block,
        *("rounds=1", "train.lr=0.05", "train.epochs=1", *more),
    ]


def token_ids() -> torch.Tensor:
    return torch.randint(0, 20, (3, 6), generator=rng(1, "ids"))


def base_model(folder: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("family, slices", [("gpt2", ""), ("gpt2", "qv"), ("llama", "")])
def test_peft_gives_the_logits_of_a_language_model_and_merges_them(tmp_path, family, slices):
    how = causal_settings(tmp_path, family, slices=slices)
    peft = pytest.importorskip("peft")
    run = open_run(create_run(1, tmp_path / "run", *how))
    folder = export_adapter(run, 1, tmp_path / "adapter")
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["task_type"] == "CAUSAL_LM" and said["fan_in_fan_out"] == (family == "gpt2")
    assert said["r"] == 2 and said["modules_to_save"] is None
    assert [*said["rank_pattern"].values()] == [4] * bool(slices)  # q and v in one pair
    assert {name.rpartition(".")[2] for name in said["target_modules"]} == {*TARGETS[family]}
    assert said["base_model_name_or_path"] == str(tmp_path / family)
    model = peft.PeftModel.from_pretrained(base_model(tmp_path / family), str(folder)).eval()
    x, network = token_ids(), run.client(1).model
    with torch.no_grad():
        ours = network(x)
        tokens = ours.shape[-1]
        theirs = model(x).logits[..., :tokens]
        merged = model.merge_and_unload()(x).logits[..., :tokens]
        plain = base_model(tmp_path / family)(x).logits[..., :tokens]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, ours, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, ours, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_of_peft_is_the_start(tmp_path, family):
    folder = small_model(tmp_path, family)
    peft = pytest.importorskip("peft")
    first, *_, last = TARGETS[family]
    norm = "ln_f" if family == "gpt2" else "model.norm"
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        use_rslora=True,
        target_modules=[*TARGETS[family]],
        rank_pattern={last: 3},
        alpha_pattern={first: 7},
        modules_to_save=[norm],
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(base_model(folder), config).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if value.requires_grad:
                value.copy_(torch.randn(value.shape, generator=rng(1, name)) * 0.5)
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = {"adapter": str(tmp_path / "adapter"), "positions": 6}
    model = zoo.build("hf", {"folder": str(folder)}, 24, (6,), 1, 24, **adapter).eval_mode()
    layers = tuple(f"*.{target}.weight" for target in TARGETS[family])
    method = algorithms.find_algorithm("fedit")(lora_ranks=(4,), layers=layers, full=())
    method.check(model, None)
    v = method.init(model, rng(1, "init"))
    with torch.no_grad():
        ours, logits = method.logits(model, v, token_ids()), theirs(token_ids()).logits
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    assert {len(A) for A, _, _ in model.adapter.factors.values()} == {2, 3}
    assert any(norm in name for name in model.adapter.whole)


def test_a_conv1d_is_the_linear_whose_weight_it_has_transposed(tmp_path):
    folder = small_model(tmp_path, "gpt2")
    model = zoo.build("hf", {"folder": str(folder)}, 24, (6,), 1, 24, positions=6)
    name = "model.transformer.h.0.mlp.c_fc.weight"
    leaf = model.leaves[name]
    assert (leaf.shape, leaf.is_linear) == ((8, 32), True)
    method = algorithms.find_algorithm("fedit")(lora_ranks=(3,), layers=("*.c_fc.weight",), full=())
    shared = method.init(model, rng(1, "init")).shared
    A, B = (factors_by_weight(shared, letter)[name] for letter in "AB")
    assert (A.shape, B.shape) == ((3, 8), (32, 3))
    update = torch.randn(32, 8, generator=rng(1, "update"))
    x = torch.randn(5, 8, generator=rng(1, "x"))
    torch.testing.assert_close(x @ as_weight(update, leaf), x @ update.T)


def test_tied_embeddings_are_refused_by_their_other_name_and_by_an_export(tmp_path):
    how = causal_settings(tmp_path, "gpt2")
    with pytest.raises(Refusal, match="lm_head.weight: tied, name model.transformer.wte.weight"):
        build(read(TINY, [*how, "algorithm.layers=['*.lm_head.weight']"]), str(TINY), Solo())
    run = open_run(create_run(1, tmp_path / "run", *how, "algorithm.layers=['*.wte.weight']"))
    with pytest.raises(ValueError, match="wte.weight: is tied, one weight with model.lm_head"):
        export_adapter(run, 0, tmp_path / "adapter")
