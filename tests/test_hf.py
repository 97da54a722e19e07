"""Pre-trained models of Hugging Face: their logits, their tokens, training in loop and stack, and
the way back to peft.

The models are tiny and random; they are made in a temporary folder. Skipped without transformers.
"""

import csv
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from runs import TESTS, assert_same_run, trees_equal
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

from fedlora_mpi import algorithms
from fedlora_mpi.analysis.run_view import open_run
from fedlora_mpi.cli import main
from fedlora_mpi.config import read
from fedlora_mpi.config.blocks import ConfigError
from fedlora_mpi.core.batch import Batch
from fedlora_mpi.core.seeds import isolate_rng, rng
from fedlora_mpi.core.vision import import_torchvision
from fedlora_mpi.data.texts import Text, Vocabulary
from fedlora_mpi.experiment.assembly import build as build_run
from fedlora_mpi.experiment.loop import resume, start
from fedlora_mpi.models import huggingface, weights, zoo
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import Refusal

import_torchvision()  # see there: transformers imports it
transformers = pytest.importorskip("transformers")

import tokenizers  # noqa: E402

WORDS = [
    "the",
    "a",
    "of",
    "and",
    "wave",
    "tide",
    "salt",
    "boat",
    "rock",
    "path",
    "snow",
    "goat",
    "road",
    "shop",
    "tram",
]
TOPICS = {"sea": WORDS[4:8], "hill": WORDS[8:12], "town": WORDS[12:]}
SPECIAL = {
    "roberta": ("<s>", "<pad>", "</s>", "<unk>"),
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
}
SPECIAL["distilbert"] = SPECIAL["bert"]
FAMILIES = tuple(SPECIAL)
LENGTH, CLASSES, TOKENS = 8, 3, 4 + len(WORDS)
LOW = ("query", "value"), ("q_lin", "v_lin")


def config_of(family, labels=CLASSES, dropout=0.0):
    """A tiny model's configuration."""
    if family == "distilbert":
        sizes = {"dim": 12, "hidden_dim": 20, "n_layers": 2, "n_heads": 2}
        noise = {"dropout": dropout, "attention_dropout": dropout, "seq_classif_dropout": dropout}
    else:
        sizes = {
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        noise = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    given = {
        "pad_token_id": SPECIAL[family].index("<pad>" if family == "roberta" else "[PAD]"),
        "num_labels": labels,
    }
    given |= {"initializer_range": 0.3}  # far enough from zero for a mask to be seen
    given |= {"vocab_size": 24, "max_position_embeddings": 16}
    return transformers.AutoConfig.for_model(family, **sizes, **noise, **given)


def saved(folder, family, auto="SequenceClassification", **options):
    """The folder of a tiny random model with its tokenizer."""
    with isolate_rng(7, family):
        model = getattr(transformers, f"AutoModelFor{auto}").from_config(
            config_of(family, **options)
        )
    model.save_pretrained(folder)
    tokenizer_of(family).save(str(folder / "tokenizer.json"))
    return folder


def tokenizer_of(family):
    """Words and the family's special tokens around each text."""
    special = SPECIAL[family]
    first, unknown, last = (special[i] for i in ((0, 3, 2) if family == "roberta" else (2, 1, 3)))
    vocabulary = {word: number for number, word in enumerate((*special, *WORDS))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in (first, last)]
    single = f"{first} $A {last}"
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=ends
    )
    tokenizer.add_special_tokens(list(special))
    return tokenizer


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(tmp_path, family):
    return saved(tmp_path / family, family)


def padding_of(family):
    return 1 if family == "roberta" else 0


def network(folder, family, classes=CLASSES, seed=1, length=LENGTH):
    return zoo.build(
        "hf", {"folder": str(folder)}, classes, (length,), seed, TOKENS, padding_of(family)
    )


def plain(folder):
    """The model as transformers itself loads it."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True
    ).eval()


def ids(family, *lengths, seed=3):
    """Texts of so many tokens."""
    x = torch.randint(2, TOKENS, (len(lengths), LENGTH), generator=rng(seed, "ids"))
    return torch.where(torch.arange(LENGTH) < torch.tensor(lengths)[:, None], x, padding_of(family))


# The network


def test_the_logits_are_those_of_transformers_with_its_mask(folder, family):
    model, x = network(folder, family), ids(family, 8, 5, 2, 1)
    mask = (x != padding_of(family)).long()
    for theirs in (
        plain(folder),
        transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval(),
    ):
        with torch.no_grad():
            ours = model.eval_mode()(model.initial, x)
            torch.testing.assert_close(ours, theirs(x, mask).logits, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(theirs(x).logits, theirs(x, mask).logits, atol=1e-3)


def test_padding_changes_no_logit(folder, family):
    model, x = network(folder, family).eval_mode(), ids(family, 4, 1, 3)
    torch.testing.assert_close(
        model(model.initial, x[:, :4]), model(model.initial, x), rtol=1e-5, atol=1e-6
    )


def test_the_head_is_the_last_linear_and_the_low_rank_names_match(folder, family):
    model = network(folder, family)
    head = "model.classifier.out_proj" if family == "roberta" else "model.classifier"
    assert model.head == head and not model.noisy and model.flops > 0
    assert {n for n, leaf in model.leaves.items() if leaf.role == "head"} == {
        f"{head}.weight",
        f"{head}.bias",
    }
    assert all("norm" in n.lower() for n, leaf in model.leaves.items() if leaf.role == "norm")
    names = LOW[family == "distilbert"]
    for name in names:
        assert (
            sum(
                n.endswith(f".{name}.weight") and leaf.matrix == "linear"
                for n, leaf in model.leaves.items()
            )
            == 2
        )
    x = ids(family, 8, 3)
    assert torch.equal(
        model.classify(model.initial, model.features(model.initial, x)), model(model.initial, x)
    )


@pytest.mark.filterwarnings("error")  # torch warns where it has no batching rule
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stack_has_the_gradients_of_the_loop(tmp_path, family, dropout):
    model = network(saved(tmp_path / family, family, dropout=dropout), family)
    assert model.noisy == (dropout > 0)
    x = torch.stack([ids(family, 8, 5, 2, seed=s) for s in range(4)])
    y, keys = torch.tensor([[0, 1, 2]]).expand(4, 3), torch.arange(4)
    real = torch.tensor([[True, True, True], [True, True, False]] * 2)

    def loss(tree, x, y, real, key):
        with model.training_context(batch := Batch(x, y, real, key, torch.ones(3))):
            return (
                cross_entropy(model(tree, batch.x), batch.y, reduction="none") * batch.real
            ).sum()

    trees = {
        n: v + 0.1 * torch.randn(4, *v.shape, generator=rng(1, n)) for n, v in model.initial.items()
    }
    stack = vmap(grad(loss))(trees, x, y, real, keys)
    for c in range(4):
        alone = grad(loss)({n: v[c] for n, v in trees.items()}, x[c], y[c], real[c], keys[c])
        for name, value in alone.items():
            torch.testing.assert_close(stack[name][c], value, rtol=1e-4, atol=1e-5)


def test_dropout_follows_the_key_alone(tmp_path, family):
    model = network(saved(tmp_path / family, family, dropout=0.3), family)
    x = ids(family, 8, 5)

    def logits(key):
        with model.training_context(
            Batch(x, torch.zeros(2), None, torch.tensor(key), torch.ones(3))
        ):
            return model(model.initial, x)

    assert torch.equal(logits(3), logits(3)) and not torch.allclose(logits(3), logits(4))
    assert not torch.allclose(logits(3), model.eval_mode()(model.initial, x))


def test_with_other_classes_the_last_layer_is_new_and_of_the_seed(folder, family):
    model, other, again = (
        network(folder, family, 5),
        network(folder, family, 5, seed=2),
        network(folder, family, 5),
    )
    theirs = plain(folder).state_dict()
    assert model(model.initial, ids(family, 8, 5)).shape == (2, 5)
    for name, value in model.initial.items():
        assert torch.equal(value, again.initial[name])
        if model.role(name) != "head":
            assert torch.equal(value, theirs[name.removeprefix("model.")])
    weight = f"{model.head}.weight"
    assert not torch.equal(model.initial[weight], other.initial[weight])


def test_of_a_language_model_what_classifies_is_new(tmp_path, family):
    folder = saved(tmp_path / family, family, auto="MaskedLM")
    model = network(folder, family)
    fresh = {n for n in model.modules[0].fresh}
    parts = {
        "roberta": {"classifier"},
        "bert": {"classifier", "bert"},
        "distilbert": {"classifier", "pre_classifier"},
    }
    assert {n.partition(".")[0] for n in fresh} == parts[family]
    assert all("pooler" in n for n in fresh if n.startswith("bert."))


def test_a_new_head_does_not_depend_on_the_process(tmp_path):
    folder, family = saved(tmp_path / "roberta", "roberta", auto="MaskedLM"), "roberta"
    code = (
        "import sys; from test_hf import network, torch; "
        "print(sum(v.double().abs().sum() for v in network(*sys.argv[1:], "
        "5).initial.values()).item().hex())"
    )

    path = f"{TESTS}:{TESTS.parent}:{os.environ.get('PYTHONPATH', '')}"

    def run(seed):
        return subprocess.run(
            [sys.executable, "-c", code, str(folder), family],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert run("1") == run("2") != ""


# Mistakes


@pytest.fixture
def bert(tmp_path):
    return saved(tmp_path / "bert", "bert")


def refused(folder, match, family="bert", tokens=TOKENS, padding=0, length=LENGTH, classes=CLASSES):
    with pytest.raises(
        ValueError, match=f"^name = hf: cannot be built: folder = .*: {match}"
    ) as error:
        zoo.build("hf", {"folder": str(folder)}, classes, (length,), 1, tokens, padding)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_none_is_refused(bert, tmp_path):
    refused(
        tmp_path / "no",
        "has no config.json; give the folder of a model of Hugging Face on this machine",
    )
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    refused(bert, "has no model.safetensors; give")
    (bert / "model.safetensors").write_bytes(b"\x00" * 40)
    refused(bert, ".*model.safetensors is no safetensors file, or damaged")
    refused(bert / "other.json", "has no other.json; give")
    (bert / "config.json").write_text("{")
    refused(bert / "config.json", "transformers cannot read it: ")
    (bert / "config.json").write_text('{"model_type": "vit"}')
    refused(
        bert / "config.json",
        "transformers cannot read it: it has no sequence classifier of the kind vit$",
    )


def test_weights_that_do_not_fit_are_refused(bert):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"intermediate_size": 21}))
    refused(
        bert,
        "model.safetensors does not fit config.json: bert.encoder.layer.0.intermediate.dense.* is "
        ".*, and 5",
    )
    (bert / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(bert, "model.safetensors does not fit config.json: bert.encoder.layer.2.attention")


def test_weights_that_are_not_finite_are_refused(bert):
    tree = weights.read(bert / "model.safetensors")
    tree |= {"classifier.bias": torch.tensor([0, torch.inf, 0])}
    (bert / "model.safetensors").write_bytes(weights.pack_safetensors(tree))
    refused(bert, "classifier.bias has numbers that are not finite")


def test_weights_may_be_in_several_files_of_which_none_may_be_gone(tmp_path, family):
    folder = saved(tmp_path / family, family)
    model = network(folder, family)
    plain(folder).save_pretrained(folder, max_shard_size="4KB")
    (folder / "model.safetensors").unlink()
    parts = huggingface.required_files(str(folder))[1:]
    assert len(parts) > 2 and parts == tuple(sorted(folder.glob("*.safetensors")))
    assert trees_equal(network(folder, family).initial, model.initial)
    parts[1].unlink()
    refused(folder, f"has no {parts[1].name}; give", family, padding=padding_of(family))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    refused(
        folder,
        "model.safetensors.index.json names no files of weights$",
        family,
        padding=padding_of(family),
    )


def test_old_names_of_leaves_are_known(bert):
    model, tree = network(bert, "bert"), weights.read(bert / "model.safetensors")

    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )

    (bert / "model.safetensors").write_bytes(
        weights.pack_safetensors({old(n): v for n, v in tree.items()})
    )
    assert trees_equal(network(bert, "bert").initial, model.initial)


def test_an_adapter_in_the_folder_is_left_alone(bert):
    model = network(bert, "bert")
    (bert / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}'
    )
    (bert / "adapter_model.safetensors").write_bytes(weights.pack_safetensors({"a": torch.ones(3)}))
    assert trees_equal(network(bert, "bert").initial, model.initial)


def test_a_config_json_alone_is_the_network_with_weights_of_the_seed(folder, family):
    model, path = network(folder, family), folder / "config.json"
    one, again, two = (network(path, family, seed=seed) for seed in (1, 1, 2))
    assert one.leaves == model.leaves and trees_equal(one.initial, again.initial)
    assert not trees_equal(one.initial, two.initial) and not trees_equal(one.initial, model.initial)


def test_code_of_the_folder_does_not_run(bert):
    config = json.loads((bert / "config.json").read_text())
    (bert / "own.py").write_text("raise SystemExit('it ran')")
    auto = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}
    (bert / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    refused(bert, "transformers cannot read it: .*trust_remote_code")


def test_tokens_that_are_not_the_models_are_refused(bert):
    refused(
        bert,
        "knows 24 tokens, 0 for padding; data.text.tokenizer has 25, 0 for padding; give the",
        tokens=25,
    )
    refused(
        bert,
        "knows 24 tokens, 0 for padding; data.text.tokenizer has 19, 1 for padding; give the",
        padding=1,
    )


def test_texts_longer_than_the_positions_are_refused(tmp_path, family):
    folder = saved(tmp_path / family, family)
    last = 14 if family == "roberta" else 16  # its first two positions are taken
    network(folder, family, length=last)
    message = f"refuses texts of data.text.length = {last + 1} tokens"
    refused(folder, message, padding=padding_of(family), length=last + 1)


def test_a_decoder_is_refused(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=24,
        n_positions=16,
        n_embd=12,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        num_labels=3,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    )
    with isolate_rng(1, "gpt2"):
        transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    refused(
        tmp_path / "gpt2",
        "a gpt2 hides padding in a way of its own; roberta, bert and distilbert do not",
    )


def test_a_model_of_texts_does_not_enlarge(bert):
    refused_options = {"folder": str(bert), "resize": True}
    with pytest.raises(ValueError, match="built: resize = true: the data are texts; leave it out$"):
        zoo.build("hf", refused_options, CLASSES, (LENGTH,), 1, TOKENS, 0)


def test_a_network_that_takes_0_for_padding_is_told():
    with pytest.raises(
        ValueError, match="built: it takes 0 for padding, data.text.tokenizer 1; give it a param"
    ):
        zoo.build("test_hf:takes_no_padding", {}, 3, (8,), 1, 19, 1)
    options = {"width": 6, "heads": 2, "layers": 1, "feedforward": 10}
    model = zoo.build("transformer", options, 3, (8,), 1, 19, 1).eval_mode()
    x = ids("roberta", 4, 2)
    torch.testing.assert_close(
        model(model.initial, x[:, :4]), model(model.initial, x), rtol=1e-5, atol=1e-6
    )


def takes_no_padding(classes, shape, tokens):
    raise AssertionError("never called")


# Tokens


def test_a_tokenizer_is_used_as_it_is(folder, family):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="<pad>" if family == "roberta" else "[PAD]",
    )
    texts = ["the boat", "", "zebra and salt", " ".join(WORDS)]
    theirs = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
    for given in (str(folder), str(folder / "tokenizer.json")):
        vocabulary = Vocabulary.from_tokenizer(Text(length=LENGTH, tokenizer=given))
        assert vocabulary.encode(texts).tolist() == theirs
        assert (vocabulary.size, vocabulary.padding, vocabulary.length) == (
            TOKENS,
            padding_of(family),
            LENGTH,
        )
        again = Vocabulary(vocabulary.json)
        assert again.encode(texts).tolist() == theirs and again.padding == vocabulary.padding


def test_padding_is_what_the_file_pads_with(tmp_path):
    tokenizer = tokenizer_of("bert")
    tokenizer.enable_padding(pad_id=5, pad_token="of", length=3, direction="left")
    tokenizer.enable_truncation(5, direction="left", stride=2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary.from_tokenizer(Text(length=4, tokenizer=str(tmp_path)))
    assert vocabulary.padding == 5
    assert vocabulary.encode(["a", "a of and wave"]).tolist() == [[5, 2, 5, 3], [2, 7, 8, 3]]


def test_what_is_wrong_with_a_tokenizer_is_said(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    (tmp_path / "empty").mkdir()
    unpadded = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    unpadded.save(str(tmp_path / "unpadded.json"))
    tokenizer_of("bert").save(str(tmp_path / "bert.json"))
    for name, length, message in (
        ("", 8, r"text.tokenizer = .*tokenizer.json is no tokenizer.json \("),
        (
            "no.json",
            8,
            r"text.tokenizer = .*no.json cannot be read \(No such file or directory\); give a tok",
        ),
        ("empty", 8, r"text.tokenizer = .*empty/tokenizer.json cannot be read"),
        (
            "unpadded.json",
            8,
            r"text.tokenizer = .*has no token for padding; there is neither \[PAD\] nor <pad>",
        ),
        ("bert.json", 2, r"text.length = 2: must be more than the 2 special tokens of every text"),
    ):
        with pytest.raises(ValueError, match=f"^{message}") as error:
            Vocabulary.from_tokenizer(Text(length=length, tokenizer=str(tmp_path / name)))
        assert "\n" not in str(error.value)


def test_a_tokenizer_has_its_own_vocabulary(tmp_path):
    with pytest.raises(
        ValueError, match="^vocabulary = 300: a tokenizer has its own; leave it out"
    ):
        Text(vocabulary=300, tokenizer=str(tmp_path))


# Runs

CONFIG = """
rounds: 2
data:
  dataset: csv
  root: {root}
  text: {{label: topic, columns: [body], length: 8, tokenizer: {folder}}}
  partition: {{kind: dirichlet_class, alpha: 1.0, clients: 5, minimum: 4}}
model: {{name: hf, folder: {folder}}}
algorithm: {{name: fedlora, lora_epochs: 1, layers: ["*.query.weight", "*.value.weight"]}}
train: {{epochs: 2, batch_size: 4, lr: 0.05}}
engine: {{device: cpu, path: stack, group_size: 2}}
output: {root}/run
"""


def write_texts(root):
    """train.csv (60 texts) and test.csv (31), of three topics."""
    for name, numbers in (("train.csv", range(60)), ("test.csv", range(100, 131))):
        rows = []
        for number in numbers:
            topic, generator = list(TOPICS)[number % 3], rng(1, "text", number)
            words = [*TOPICS[topic], *WORDS[:4]]
            chosen = torch.randint(0, len(words), (3 + number % 7,), generator=generator).tolist()
            rows.append((number, topic, " ".join(words[i] for i in chosen)))
        with open(root / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "topic", "body"), *rows])


def config_file(root, family, **options):
    """A config of a tiny model whose language model, not its classifier, was pre-trained."""
    write_texts(root)
    folder = saved(root / family, family, **options)
    text = CONFIG.format(root=root, folder=folder)
    for name, other in zip(*LOW, strict=True) if family == "distilbert" else ():
        text = text.replace(name, other)
    path = root / f"{family}.yaml"
    path.write_text(text)
    return path


def trained(path, *overrides):
    """The run of a config, finished."""
    config = read(path, overrides)
    assert start(config, str(path), Solo()) == 0
    return open_run(config.output)


@pytest.mark.parametrize("name", ["fedavg", "fedlora"])
def test_a_stack_trains_as_the_loop(tmp_path, family, name):
    path = config_file(tmp_path, family, auto="MaskedLM", dropout=0.1)
    chosen = () if name == "fedlora" else (f"algorithm={name}",)

    def by(way):
        return trained(path, *chosen, f"engine.path={way}", f"output={tmp_path}/{way}")

    stack, loop = by("stack"), by("loop")
    for k in range(5):
        for leaf, value in stack.client(k).weights.items():
            other = torch.from_numpy(loop.client(k).weights[leaf])
            torch.testing.assert_close(torch.from_numpy(value), other, rtol=1e-4, atol=1e-5)
    first = network(tmp_path / family, family).initial
    moved = {
        n
        for n, v in first.items()
        if not torch.equal(v, torch.from_numpy(stack.client(0).weights[n]))
    }
    assert {n for n in first if "word_embeddings" in n or "classifier" in n} <= moved


def test_the_run_folder_reads_texts_again(tmp_path):
    path = config_file(tmp_path, "roberta")
    run = trained(path)
    assert run.vocabulary == Vocabulary.from_tokenizer(
        Text(length=8, tokenizer=str(tmp_path / "roberta"))
    )
    x = run.vocabulary.encode(["the boat and the tide", "tram"])
    assert x[1].tolist() == [0, 18, 2, 1, 1, 1, 1, 1] and run.client(3).model(x).shape == (2, 3)


def test_a_resume_moves_no_bit_and_needs_the_same_model(tmp_path):
    path = config_file(tmp_path, "bert", dropout=0.1)
    whole = trained(path)
    cut = trained(path, "rounds=1", f"output={tmp_path}/cut")
    assert resume(cut.path, ["rounds=2"], Solo()) == 0
    assert_same_run(whole.path, cut.path)
    changed = r"cut/config.yaml: model.folder = .*/bert: has changed since the run began: put back what was, or start"
    # equal weights, equal settings
    for options in ({"dropout": 0.2}, {"dropout": 0.1, "auto": "MaskedLM"}):
        saved(tmp_path / "bert", "bert", **options)
        with pytest.raises(Refusal, match=changed):
            resume(cut.path, ["rounds=3"], Solo())
    saved(tmp_path / "bert", "bert", dropout=0.1)
    assert resume(cut.path, ["rounds=3"], Solo()) == 0
    tokenizer_of("roberta").save(str(tmp_path / "bert/tokenizer.json"))
    with pytest.raises(Refusal, match="data.text.tokenizer"):
        resume(cut.path, ["rounds=4"], Solo())


def test_a_run_is_read_without_its_folder_where_a_checkpoint_has_every_leaf(tmp_path, family):
    path = config_file(tmp_path, family, auto="MaskedLM")
    whole = trained(path, "algorithm=fedavg", f"output={tmp_path}/whole")
    frozen = trained(path, FROZEN, f"output={tmp_path}/frozen")
    x = whole.vocabulary.encode(["the boat and the tide", "tram"])
    there = whole.client(3)
    logits = there.model(x)
    (tmp_path / family).rename(tmp_path / "moved")
    gone = open_run(whole.path).client(3)
    assert (
        all(v.is_meta for v in gone.network.initial.values())
        and gone.network.leaves == there.network.leaves
    )
    assert torch.equal(gone.model(x), logits)
    message = (
        f"^.*frozen: model.*weight is in model.folder = .*/{family} alone, which is gone; put it "
        "back$"
    )
    with pytest.raises(ValueError, match=message):
        open_run(frozen.path).client(3).weights
    (tmp_path / "moved").rename(tmp_path / family)
    assert open_run(frozen.path).client(3).weights.keys() == there.weights.keys()


def test_the_folder_and_a_file_of_weights_both_belong_to_the_run(tmp_path, monkeypatch):
    path = config_file(tmp_path, "bert", auto="MaskedLM")
    file = tmp_path / "net.safetensors"
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["pretrain", str(path), "--to", str(file), "--epochs", "1"]) == 0
    given = weights.read(file)
    run = trained(path, f"model.weights={file}", "rounds=1")
    assert trees_equal(run.client(0).network.initial, given)
    assert not trees_equal(given, network(tmp_path / "bert", "bert").initial)
    other = weights.pack_safetensors(given | {"model.classifier.bias": torch.zeros(3)})
    for key, changed, content in (
        ("folder", tmp_path / "bert/config.json", None),
        ("weights", file, other),
    ):
        kept = changed.read_bytes()
        changed.write_bytes(content or kept + b" ")
        with pytest.raises(
            Refusal, match=f"config.yaml: model.{key} = .*: has changed since the run began"
        ):
            resume(run.path, ["rounds=2"], Solo())
        changed.write_bytes(kept)
    assert resume(run.path, ["rounds=2"], Solo()) == 0


def test_mistakes_in_a_config_name_file_and_key(tmp_path):
    path = config_file(tmp_path, "bert")
    with pytest.raises(
        Refusal,
        match=r"bert.yaml: data.text.tokenizer = null: network hf reads the tokens of its own",
    ):
        build_run(read(path, ["data.text.tokenizer=null"]), str(path), Solo())
    with pytest.raises(
        Refusal,
        match=r"bert.yaml: model.name = hf: cannot be built: folder = no: has no config.json",
    ):
        build_run(read(path, ["model.folder=no"]), str(path), Solo())
    with pytest.raises(Refusal, match=r"bert.yaml: data.text.tokenizer = no: no cannot be read"):
        build_run(read(path, ["data.text.tokenizer=no"]), str(path), Solo())
    with pytest.raises(
        ConfigError, match=r"data.text.vocabulary = 9: a tokenizer has its own; leave it out"
    ):
        read(path, ["data.text.vocabulary=9"])
    path.write_text(re.sub(r"folder: [^,}\n]+", "head: null", path.read_text()))
    with pytest.raises(ConfigError, match=r"model.folder: must be given"):
        read(path)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = config_file(tmp_path, "bert")
    begin = f"fedlora-mpi: {path}: model.name = hf: cannot be built: folder = "

    def told(line, command="run"):
        capsys.readouterr()
        assert main([command, str(path), line]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(begin) and err.count("\n") == 1, err
        return err

    assert "has no config.json; give the folder" in told("model.folder=nowhere")
    assert "has no config.json; give the folder" in told("model.folder=nowhere", "plan")
    assert "refuses texts of data.text.length = 17 tokens" in told("data.text.length=17")
    (tmp_path / "vit.json").write_text('{"model_type": "vit"}')
    assert "it has no sequence classifier of the kind vit" in told(
        f"model.folder={tmp_path}/vit.json"
    )
    file = tmp_path / "bert/model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert "model.safetensors is no safetensors file, or damaged" in told("rounds=1")
    assert not (tmp_path / "run").exists()


# To peft

FROZEN = "algorithm=user_parts:FrozenLora"


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """The command into a folder of ``tmp_path``: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # commands put the folder in front

    def called(run, client=0, to="out"):
        capsys.readouterr()
        code = main(["export", str(run.path), "--client", str(client), "--to", str(tmp_path / to)])
        return code, *capsys.readouterr()

    return called


def assert_refused(result, *parts):
    """Code 2 and one line that holds the parts."""
    code, out, err = result
    assert (code, out) == (2, "") and err.startswith("fedlora-mpi: ") and err.count("\n") == 1, err
    assert all(part in err for part in parts), err


@pytest.mark.parametrize(
    "auto, labels", [("SequenceClassification", 3), ("SequenceClassification", 4), ("MaskedLM", 3)]
)
def test_peft_gives_the_logits_of_the_client(tmp_path, family, auto, labels, export):
    peft = pytest.importorskip("peft")
    path = config_file(tmp_path, family, auto=auto, labels=labels)
    run = trained(path, FROZEN, f"output={tmp_path}/frozen")
    assert export(run, 3, "adapter") == (0, f"{tmp_path}/adapter\n", "")
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (
        said["base_model_name_or_path"] == str(tmp_path / family) and said["task_type"] == "SEQ_CLS"
    )
    assert len(said["target_modules"]) == 4 and said["rank_pattern"] and said["alpha_pattern"]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / family, num_labels=3, ignore_mismatched_sizes=True, local_files_only=True
    )
    client = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    x = run.vocabulary.encode(["the boat and the tide", "tram", "goat snow"]).long()
    with torch.no_grad():
        logits = client(x, (x != padding_of(family)).long()).logits
        torch.testing.assert_close(logits, run.client(3).model(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits, run.client(0).model(x), atol=1e-4)
    names = {name for name in run.client(3).network.leaves if f"{name}.A" in run.shared}
    assert {f"model.{module}.weight" for module in said["target_modules"]} == names


ADAPTED = [
    name
    for name in algorithms.algorithm_names()
    if callable(getattr(algorithms.find_algorithm(name), "adapter", None))
]


@pytest.mark.parametrize("method", ADAPTED)
def test_peft_gives_the_logits_under_every_method_with_an_adapter(tmp_path, method, export):
    peft = pytest.importorskip("peft")
    path = config_file(tmp_path, "roberta", auto="MaskedLM")
    layers = ["*.query.weight", "*.intermediate.dense.weight"]
    run = trained(path, f"algorithm={{name: {method}, lora_ranks: [2, 5], layers: {layers}}}")
    for client, rank in ((0, 2), (3, 5)):
        result = export(run, client, str(client))
        if result[0]:
            assert_refused(result, "holds a dense update of the frozen weights")
            continue
        assert json.loads((tmp_path / f"{client}/adapter_config.json").read_text())["r"] == rank
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "roberta", num_labels=3
        )
        model = peft.PeftModel.from_pretrained(base, str(tmp_path / str(client))).eval()
        x = run.vocabulary.encode(["the boat and the tide", "tram"]).long()
        torch.testing.assert_close(
            model(x, (x != 1).long()).logits, run.client(client).model(x), rtol=1e-5, atol=1e-5
        )


def test_a_base_on_other_weights_is_not_that_of_the_folder(tmp_path, export):
    path = config_file(tmp_path, "bert")
    (tmp_path / "net.safetensors").write_bytes(
        weights.pack_safetensors(network(tmp_path / "bert", "bert", seed=2).initial)
    )
    for number, given in enumerate(("weights={}/net.safetensors", "folder={}/bert/config.json")):
        given = f"model.{given.format(tmp_path)}"
        run = trained(path, "rounds=1", FROZEN, given, f"output={tmp_path}/run{number}")
        assert export(run, to=f"{number}") == (0, f"{tmp_path}/{number}\n", "")
        assert (
            json.loads((tmp_path / f"{number}/adapter_config.json").read_text())[
                "base_model_name_or_path"
            ]
            is None
        )


def test_a_low_rank_part_of_the_head_is_written_into_it(tmp_path, export):
    peft = pytest.importorskip("peft")
    path = config_file(tmp_path, "roberta")
    layers = "algorithm.layers=['*.query.weight','*.classifier.dense.weight']"
    run = trained(
        path, FROZEN, layers, "algorithm.head=['*.out_proj.*']", f"output={tmp_path}/frozen"
    )
    export(run, 1, "adapter")
    client = peft.PeftModel.from_pretrained(
        plain(tmp_path / "roberta"), str(tmp_path / "adapter")
    ).eval()
    x = run.vocabulary.encode(["the boat and the tide", "tram"]).long()
    torch.testing.assert_close(
        client(x, (x != 1).long()).logits, run.client(1).model(x), rtol=1e-5, atol=1e-5
    )
    only = trained(path, FROZEN, layers.replace("'*.query.weight',", ""), f"output={tmp_path}/only")
    assert_refused(
        export(only), "no low-rank part is outside of what is written whole (classifier)"
    )


def test_what_has_no_adapter_is_refused(tmp_path, export):
    path = config_file(tmp_path, "bert")
    run = trained(path, "rounds=1")
    assert_refused(export(run), "run: algorithm fedlora has no adapter that stands alone")
    # has a field ``adapter``
    other = trained(path, "rounds=1", "algorithm=pfedlora", f"output={tmp_path}/other")
    assert_refused(export(other), "other: algorithm pfedlora has no adapter that stands alone")
    dense = trained(path, "rounds=1", FROZEN, "algorithm.dense=true", f"output={tmp_path}/dense")
    assert_refused(export(dense), "the server has changed the frozen weights themselves")
    assert_refused(export(dense, 5), "there is no client 5; there are 0 to 4")
    frozen = trained(path, "rounds=1", FROZEN, f"output={tmp_path}/frozen")
    assert_refused(
        export(frozen, to="bert"), "bert: cannot be created: File exists; choose another"
    )


def test_other_networks_keep_their_names_and_convolutions_are_refused(tmp_path, export):
    from safetensors.torch import load_file

    settings = [FROZEN, "model=cnn", "rounds=1"]
    linear = [
        "algorithm.layers=['7.weight']",
        "algorithm.head=['9.*']",
        f"output={tmp_path}/linear",
    ]
    run = trained(TESTS / "tiny.yaml", *settings, *linear)
    export(run, 2, "adapter")
    found = load_file(tmp_path / "adapter/adapter_model.safetensors")
    base = "base_model.model"
    assert set(found) == {
        f"{base}.7.lora_A.weight",
        f"{base}.7.lora_B.weight",
        f"{base}.9.weight",
        f"{base}.9.bias",
    }
    assert torch.equal(
        found[f"{base}.9.weight"], torch.from_numpy(run.client(2).personal["9.weight"])
    )
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["target_modules"], said["modules_to_save"]) == (
        1,
        1,
        ["7"],
        ["9"],
    )
    conv = trained(
        TESTS / "tiny.yaml", *settings, "algorithm.layers=['3.weight']", f"output={tmp_path}/conv"
    )
    assert_refused(export(conv), "3.weight: is no weight of a Linear, and no other is exported")
