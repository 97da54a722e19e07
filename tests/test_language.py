"""Language models: the loss of the next token, texts as data, the networks, and whole runs."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from causal import small_model
from runs import assert_same_run, run_on_ranks
from tiers import thorough_param

from fedlora_mpi import config as configs
from fedlora_mpi import open_run
from fedlora_mpi.algorithm import Variables
from fedlora_mpi.algorithms import find_algorithm
from fedlora_mpi.config.blocks import ConfigError
from fedlora_mpi.config.writing import complete_tree
from fedlora_mpi.core.batch import Batch
from fedlora_mpi.core.losses import IGNORED, find_loss, token_losses
from fedlora_mpi.core.names import is_factor
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.data.datasets import load
from fedlora_mpi.data.language import Language
from fedlora_mpi.data.source import Source
from fedlora_mpi.data.texts import Text
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.loop import _start_new_run, resume
from fedlora_mpi.experiment.output import config_to_resume
from fedlora_mpi.experiment.pretrain import pretrain
from fedlora_mpi.models import weights, zoo
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import Refusal
from fedlora_mpi.store.reader import RunFiles

LOSS = find_loss("next_token")
WORDS = [
    "the",
    "sea",
    "the",
    "boat",
    "a",
    "wave",
    "rock",
    "path",
    "snow",
    "goat",
    "road",
    "shop",
    "tram",
    "salt",
    "tide",
    "hill",
]
LENGTH = 6
LORA = ("fedit", "flexlora", "flora", "hetlora", "fedhl", "fedex_lora", "ffa_lora", "rolora")


def lines(count: int, *address: object, longest: int = 9) -> list[str]:
    """Texts of 2 to ``longest`` words, which follow one another as in ``WORDS``."""
    stream = rng(1, "lines", *address)
    firsts = torch.randint(len(WORDS), (count,), generator=stream).tolist()
    lengths = torch.randint(2, longest + 1, (count,), generator=stream).tolist()
    return [
        " ".join((2 * WORDS)[first : first + length])
        for first, length in zip(firsts, lengths, strict=True)
    ]


@pytest.fixture
def texts(tmp_path) -> Path:
    """A folder with train.txt and test.txt."""
    (tmp_path / "train.txt").write_text("\n".join(lines(120, "train")) + "\n")
    (tmp_path / "test.txt").write_text("\n\n".join(lines(40, "test")) + "\n")
    return tmp_path


def write_json(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def tree_of(folder: Path, **blocks) -> dict:
    files = {"train": "train.txt", "test": "test.txt"}
    given = {
        "data": {
            "dataset": "text_lm",
            "root": str(folder),
            "text": {"length": LENGTH, **files},
            "partition": {"kind": "iid", "clients": 5, "train": 20, "test": 6},
        },
        "model": {"name": "gpt", "loss": "next_token", "width": 8, "heads": 2, "layers": 1},
        "algorithm": "fedit",
        "rounds": 2,
        "output": str(folder / "run"),
        "engine": {"device": "cpu", "path": "stack", "group_size": 2},
        "train": {"epochs": 2, "batch_size": 8, "lr": 0.1},
        "checkpoint": {"every": 1},
        "evaluate": {"metrics": ["perplexity"]},
    }
    return given | blocks


PACKED = {"packing": True}  # data.language
SINGLE = pytest.param({}, id="single")


def built_of(folder: Path, language: dict | None = None, length: int = LENGTH, **blocks):
    tree = tree_of(folder, **blocks)
    tree["data"]["text"]["length"] = length
    tree["data"]["language"] = language or {}
    return build(configs.from_dict(tree, "test"), "test", Solo())


def load_data(folder: Path, dataset: str = "text_lm", **how):
    text = {"length": LENGTH, "train": "train.txt", "test": "test.txt"} | how.pop("text", {})
    return load(Source(dataset, str(folder), text=Text(**text), **how), "tokens")


def run(folder: Path, name: str, ranks: int = 1, **blocks) -> Path:
    output = folder / name
    config = configs.from_dict(tree_of(folder, **blocks) | {"output": str(output)}, "test")
    codes = run_on_ranks(ranks, lambda comm: _start_new_run(output, config, "test", comm, []))
    assert codes == [0] * ranks
    return output


# The loss


def outputs_and_targets(batch=5, length=7, tokens=11):
    logits = torch.randn(batch, length, tokens, generator=rng(1, "logits"), dtype=torch.float64)
    y = torch.randint(0, tokens, (batch, length), generator=rng(1, "y"))
    y[torch.rand(batch, length, generator=rng(1, "mask")) < 0.3] = IGNORED
    y[2] = IGNORED  # a text without a target
    return logits.requires_grad_(), y


@pytest.mark.parametrize("real", [None, [True, True, True, True, False]])
def test_the_loss_is_that_of_torch_over_all_tokens_that_have_a_target(real):
    logits, y = outputs_and_targets()
    mask = None if real is None else torch.tensor(real)
    batch = Batch(torch.zeros(5, 7), y, mask, torch.tensor(0), torch.ones(1))
    kept = y if mask is None else torch.where(mask[:, None], y, IGNORED)
    expected = F.cross_entropy(logits.flatten(0, 1), kept.flatten(), ignore_index=IGNORED)
    found = LOSS(logits, batch)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert LOSS(logits, batch._replace(y=torch.full_like(y, IGNORED))) == 0  # no target, no NaN


def test_infinite_outputs_of_padding_do_no_harm():
    logits, y = outputs_and_targets()
    broken = logits.detach().clone()
    broken[-1] = float("inf")
    broken.requires_grad_()
    real = torch.tensor([True] * 4 + [False])
    LOSS(broken, Batch(torch.zeros(5, 7), y, real, torch.tensor(0), torch.ones(1))).backward()
    assert broken.grad.isfinite().all()


# Data


def test_a_target_is_the_next_token_and_padding_has_none(texts):
    data = load_data(texts)
    words = [line.split() for line in (texts / "train.txt").read_text().splitlines()]
    names = {i: w for w, i in data.vocabulary.tokenizer.get_vocab().items()}
    assert data.targets == "tokens" and data.classes == data.vocabulary.size
    assert data.train.x.shape == data.train.y.shape == (120, LENGTH)
    for x, y, text in zip(data.train.x.tolist(), data.train.y.tolist(), words, strict=True):
        text = text[: LENGTH + 1]
        assert [names[i] for i in x if i][: len(text)] == text[:LENGTH]
        assert [names[i] for i in y if i != IGNORED] == text[1:]
        assert y[len(text) - 1 :] == [IGNORED] * (LENGTH + 1 - len(text))


def test_only_responses_have_targets(tmp_path):
    rows = [{"prompt": "the sea", "response": "a boat"}, {"prompt": "hill", "response": "road"}]
    for name in ("train.jsonl", "test.jsonl"):
        write_json(tmp_path, name, rows)
    data = load_data(
        tmp_path,
        "instruct",
        text={"train": "train.jsonl", "test": "test.jsonl"},
        language=Language(template="salt {prompt} tide "),
    )
    names = {i: w for w, i in data.vocabulary.tokenizer.get_vocab().items()}
    said = [[names[i] for i in y if i != IGNORED] for y in data.train.y.tolist()]
    assert said == [["a", "boat"], ["road"]]
    assert [names[i] for i in data.train.x[0].tolist() if i] == [
        "salt",
        "the",
        "sea",
        "tide",
        "a",
        "boat",
    ]


@pytest.mark.parametrize(
    "template, opening",
    [
        ("salt {prompt} tide", "salt the sea tide\n"),
        ("salt {prompt} tide: {response} stop", "salt the sea tide: "),
        ("{prompt}{response} stop", "the sea"),
    ],
)
def test_a_response_is_learned_with_what_the_template_has_behind_it(template, opening):
    text, start = Language(template=template).write("the sea", "a {prompt}")
    end = " stop" if "{response}" in template else ""
    assert (text[:start], text[start:]) == (opening, "a {prompt}" + end)


@pytest.mark.parametrize("length, count", [(3, 0), (1, 1)])
def test_texts_without_a_target_are_counted_in_a_hint(length, count, tmp_path):
    rows = [{"prompt": "the sea", "response": "boat"}, {"prompt": "hill", "response": "road"}]
    for name in ("train.jsonl", "test.jsonl"):
        write_json(tmp_path, name, rows)
    files = {"train": "train.jsonl", "test": "test.jsonl", "length": length}
    data = load_data(tmp_path, "instruct", text=files)
    hint = f"text.train = train.jsonl: {count} of 2 texts have no token to predict"
    assert [line.startswith(hint) for line in data.hints] == [True] * count


def test_a_key_of_the_lines_names_the_client(tmp_path):
    for name, count in (("train.jsonl", 12), ("test.jsonl", 6)):
        rows = [{"said": t, "who": f"w{n % 3}"} for n, t in enumerate(lines(count, name))]
        write_json(tmp_path, name, rows)
    tree = tree_of(tmp_path)
    tree["data"] |= {
        "text": {"length": LENGTH, "train": "train.jsonl", "test": "test.jsonl"},
        "language": {"text": "said", "client": "who"},
        "partition": {"kind": "given", "clients": 3},
    }
    built = build(configs.from_dict(tree, "test"), "test", Solo())
    assert [rows.tolist() for rows in built.split.train] == [
        [k, k + 3, k + 6, k + 9] for k in range(3)
    ]
    tree["data"]["language"]["template"] = "Say: {prompt}\nSo:"  # never used, but recorded
    again = configs.from_dict(configs.resolved_dict(configs.from_dict(tree, "test")), "test")
    assert again == configs.from_dict(tree, "test")


def test_the_texts_of_news_are_learned_and_split_by_topic(tmp_path):
    (tmp_path / "AG_NEWS").mkdir()
    for name, count in (("train.csv", 80), ("test.csv", 40)):
        rows = [f'"{1 + n % 4}","{t}","the sea"' for n, t in enumerate(lines(count, name))]
        (tmp_path / "AG_NEWS" / name).write_text("\n".join(rows) + "\n")
    data = load(Source("ag_news", str(tmp_path), text=Text(length=LENGTH)), "tokens")
    assert data.targets == "tokens" and data.has_classes and data.label_classes == 4
    assert data.class_labels[0].tolist() == [n % 4 for n in range(80)]
    assert (
        "language" not in configs.resolved_dict(configs.from_dict(tree_of(tmp_path), "x"))["data"]
    )


@pytest.mark.parametrize("loss", ["next_token", "cross_entropy"])
def test_news_can_be_packed_to_be_learned_but_not_to_be_classified(loss, tmp_path):
    (tmp_path / "AG_NEWS").mkdir()
    for name, count in (("train.csv", 80), ("test.csv", 40)):
        rows = [f'"{1 + n % 4}","{t}","the sea"' for n, t in enumerate(lines(count, name))]
        (tmp_path / "AG_NEWS" / name).write_text("\n".join(rows) + "\n")
    tree = tree_of(tmp_path, algorithm="fedavg")
    tree["data"] |= {
        "dataset": "ag_news",
        "language": PACKED,
        "text": {"length": 30},
        "partition": {"kind": "dirichlet_client", "clients": 5, "train": 20, "test": 6},
    }
    tree["model"] |= {"loss": loss}
    config = configs.from_dict(tree, "test")
    if loss == "cross_entropy":
        with pytest.raises(Refusal, match="learned token by token are packed; set model.loss"):
            build(config, "test", Solo())
        return
    built = build(config, "test", Solo())
    assert built.split.train_counts.shape == (5, 4)  # of the topics of the texts
    assert max(built.federation.clients.sizes) < min(map(len, built.split.train)) / 2


def test_a_client_has_as_many_samples_as_packed_rows(texts):
    single, packed = (built_of(texts, language) for language in ({}, PACKED))
    assert single.split.digest() == packed.split.digest() and single.run_digest != packed.run_digest
    assert single.federation.clients.sizes == (20,) * 5
    sizes = packed.federation.clients.sizes
    assert sizes == tuple(map(len, packed.sample_split.train)) and max(sizes) < 20
    assert packed.federation.clients.weights == sizes
    feed = packed.federation.clients.types[0].trainer.feed
    tokens, packed_tokens = (
        sum(int((f.unshuffled_batch([c], True).y != IGNORED).sum()) for c in range(5))
        for f in (single.federation.clients.types[0].trainer.feed, feed)
    )
    assert tokens == packed_tokens
    assert packed.federation.clients.sizes[0] == feed.train_size(0)


def test_packing_is_recorded_only_where_it_is_set(texts):
    tree = tree_of(texts)
    for language, recorded in (
        ({}, None),
        ({"packing": False}, None),
        ({"text": "said"}, None),  # digests are those of before packing existed
        (PACKED, True),
    ):
        tree["data"]["language"] = language
        config = configs.from_dict(tree, "test")
        resolved = configs.resolved_dict(config)
        assert configs.from_dict(resolved, "test") == config
        assert resolved["data"].get("language", {}).get("packing") is recorded
        all_keys = complete_tree(config)["data"]["language"]
        assert all_keys["packing"] == bool(recorded) and len(all_keys) == 6


MISTAKES = [
    ({"model": {"name": "gpt", "width": 8}}, "dataset = text_lm: has tokens as targets"),
    ({"model": {"name": "transformer", "loss": "next_token"}}, r"gives \[2, \d+\] for 2 samples"),
    ({"model": {"name": "gpt", "loss": "next_token", "heads": 3}}, "heads = 3: must divide"),
    ({"algorithm": "fedproto"}, "needs a class of each sample"),
    ({"evaluate": {"metrics": ["auc"]}}, "choose among perplexity"),
    ({"data.dataset": "digits"}, "dataset = digits: has no texts to learn"),
    ({"data.text": {"train": "no.txt"}}, "text.train = no.txt: cannot be read"),
    ({"data.text": {"train": "empty.txt"}}, "text.train = empty.txt: is empty"),
    ({"data.text": {"train": "bytes.txt"}}, "is no text in UTF-8"),
    ({"data.text": {"train": "short.txt"}}, "no text has a token to predict"),
    ({"data.language": {"client": "who"}}, "language.client needs a file .jsonl"),
    (
        {"data.language": {"text": "said"}},
        "language.text = said: train.txt has a text in each line",
    ),
    ({"data.partition": {"kind": "given", "clients": 2}}, "or texts with data.language.client"),
    ({"data.text": {"train": "bad.jsonl"}}, "line 2: is no JSON "),
    ({"data.text": {"train": "list.jsonl"}}, "line 1: is no JSON object"),
    ({"data.text": {"train": "key.jsonl"}}, "line 1: has no text text"),
    ({"data.language": {"template": "Say:"}}, "must contain {prompt}"),
    ({"data.language": {"template": "{response}{prompt}"}}, r"\{response\} may stand there once"),
    (
        {"data.text": {"train": "number.jsonl"}},
        r"line 1: text \(language.text\) is no string, but 5",
    ),
    ({"data.shift": "labels"}, "shift = labels: needs a class of each sample.*choose none"),
    ({"data.shift": "rotate"}, "these are texts; use none"),
    ({"data.augment": ["flip"]}, "only images are transformed, an input here is a text"),
    ({"data.partition": {"kind": "dirichlet_client", "clients": 5}}, "needs a class of each"),
    (
        {"data.language": PACKED, "model": {"name": "transformer", "loss": "next_token"}},
        "name = transformer: .*reads one text at a time; set data.language.packing = false",
    ),
    ({"data.language": PACKED, "data.dataset": "digits"}, "packing = true: only texts are packed"),
    ({"data.text": {"tokenizer": "no.json"}}, "tokenizer = no.json: .* give a tokenizer.json"),
    ({"data.text": {"tokenizer": "train.txt"}}, "train.txt is no tokenizer.json"),
    (
        {"model": {"name": "hf", "folder": "none", "loss": "next_token"}},
        "data.text.tokenizer = null: network hf reads the tokens of its own tokenizer",
    ),
    (
        {
            "model": {"name": "hf", "folder": "none", "loss": "next_token"},
            "data.text": {"tokenizer": "words.json"},
        },
        "folder = none: has no config.json; give the folder of a model",
    ),
    (
        {"algorithm": {"name": "fedit", "layers": ["*.c_attn.weight"]}},
        r"layers = \*.c_attn.weight: matches no weight.*there are .*query.weight",
    ),
    (
        {"algorithm": {"name": "fedit", "layers": ["query"]}},
        r"layers = query: matches no weight; there are .* more. Did you mean \*.query.weight\?$",
    ),
]


@pytest.mark.parametrize("change, said", MISTAKES)
def test_mistakes_are_one_line(change, said, texts, monkeypatch):
    monkeypatch.chdir(texts)
    (texts / "words.json").write_text(load_data(texts).vocabulary.json)
    (texts / "empty.txt").write_text("\n \n")
    (texts / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (texts / "short.txt").write_text("sea\nboat\n")
    (texts / "bad.jsonl").write_text('{"text": "the sea"}\n{"text": \n')
    (texts / "list.jsonl").write_text("[1]\n")
    (texts / "key.jsonl").write_text('{"body": "the sea"}\n')
    (texts / "number.jsonl").write_text('{"text": 5}\n')
    tree = tree_of(texts)
    for key, value in change.items():
        block, _, name = key.rpartition(".")
        place = tree[block] if block else tree
        place[name] = place[name] | value if name == "text" else value
    with pytest.raises((Refusal, ConfigError)) as error:
        build(configs.from_dict(tree, "test"), "test", Solo())
    text = str(error.value)
    assert text.startswith("test: ") and "\n" not in text
    assert re.search(said, text), text


# Networks


def gpt(**options):
    given = {"width": 8, "heads": 2, "layers": 2, "feedforward": 12} | options
    return zoo.build("gpt", given, 11, (LENGTH,), 1, 11, positions=LENGTH)


@pytest.mark.parametrize("language", [SINGLE, pytest.param(PACKED, id="packed")])
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(language, texts):
    built = built_of(texts, language, algorithm="fedavg")
    (client_type,) = built.federation.clients.types
    zeros = {n: torch.zeros_like(v) for n, v in client_type.local_initial.shared.items()}
    scores = client_type.trainer.score_clients([0, 1], zeros, {})
    torch.testing.assert_close(
        scores[:, 1:],
        torch.tensor([[math.log(built.outputs), 0.0, float(built.outputs)]] * 2).double(),
        rtol=1e-6,
        atol=1e-6,
    )


def test_a_token_sees_none_that_come_later():
    model = gpt()
    x = torch.randint(0, 11, (3, LENGTH), generator=rng(1, "x"))
    later = x.clone()
    later[:, 4:] = (x[:, 4:] + 3) % 11
    a, b = (model.eval_mode()(model.initial, v) for v in (x, later))
    assert torch.equal(a[:, :4], b[:, :4]) and not torch.allclose(a[:, 4:], b[:, 4:])


@pytest.mark.parametrize("tied", [True, False])
def test_the_words_of_a_tied_model_are_one_leaf(tied):
    model = gpt(tied=tied)
    assert ("head.weight" in model.leaves) != tied
    assert model.leaves["words.weight"].role == "body"
    tree = {n: v.clone() for n, v in model.initial.items()}
    tree["words.weight"].zero_()
    logits = model.eval_mode()(tree, torch.ones(1, LENGTH, dtype=torch.int64))
    assert bool((logits == 0).all()) == tied


def test_padding_batch_order_and_packing_change_no_score(texts):
    scores = []
    for language, length, reverse in (
        ({}, 9, False),  # no text is longer than 9
        ({}, 14, False),
        ({}, 14, True),
        (PACKED, 9, False),
        (PACKED, 14, False),
    ):
        built = built_of(texts, language, length, algorithm="fedavg")
        (client_type,) = built.federation.clients.types
        trainer = client_type.trainer
        if reverse:
            test = tuple(rows[::-1].copy() for rows in built.split.test)
            split = replace(built.split, test=test)
            trainer = replace(trainer, feed=trainer.feed.with_split(split))
        shared = {
            n: 0.3 * torch.randn(max(len(v), 14), *v.shape[1:], generator=rng(1, n))[: len(v)]
            for n, v in client_type.local_initial.shared.items()
        }
        scores.append(trainer.score_clients(range(5), shared, {}))
    assert scores[0][:, 3].min() > 2  # the perplexity
    for others in scores[1:]:
        torch.testing.assert_close(others, scores[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LORA)
def test_a_low_rank_part_of_zero_is_the_backbone(name):
    model = gpt().eval_mode()
    x = torch.randint(0, 11, (3, LENGTH), generator=rng(1, "x"))
    method = find_algorithm(name)(lora_ranks=(3, 1), full=())
    for client in range(2):
        transport = method.transport(client, 2)
        initial = transport.method.init(model, rng(1, "init"))
        shared = transport.download(method.init(model, rng(1, "init")).shared)
        factors = [n for n in shared | initial.personal if is_factor(n)]
        assert factors
        tree = transport.method.client_model(model, Variables(shared, initial.personal))
        assert torch.equal(model(model.all_values | tree, x), model(model.initial, x))


# Runs


@pytest.mark.parametrize("language", [SINGLE, thorough_param(PACKED, id="packed")])
def test_a_run_learns_and_has_the_same_bits_on_any_ranks_and_after_a_resume(language, texts):
    data = tree_of(texts)["data"] | {"language": language}
    whole = run(texts, "whole", rounds=3, data=data)
    for ranks in (2, 3):
        assert_same_run(whole, run(texts, f"on {ranks}", ranks, rounds=3, data=data))
    cut = run(texts, "cut", 3, rounds=2, data=data)
    assert resume(cut, ["rounds=3"], Solo()) == 0
    assert_same_run(whole, cut)
    table = RunFiles(whole).rounds()
    assert table["perplexity"][-1] < 0.8 * len(WORDS)
    assert table["loss"][-1] < table["loss"][0]


@pytest.mark.thorough  # two trainings
def test_pretraining_packs_as_a_run_does(texts):
    trees = []
    for language in ({}, PACKED):
        tree = tree_of(texts, algorithm="fedavg")
        tree["data"]["language"] = language
        file = texts / f"{len(trees)}.safetensors"
        pretrain(configs.from_dict(tree, "test"), "test", 1, to=file, epochs=1)
        trees.append(weights.read(file))
    assert trees[0].keys() == trees[1].keys()
    assert not torch.equal(*(tree["words.weight"] for tree in trees))


@pytest.mark.parametrize(
    "name", [LORA[0], *(thorough_param(name) for name in (*LORA[1:], "fedlora", "fedavg", "ditto"))]
)
def test_methods_train_a_language_model_alike_one_by_one_and_in_a_stack(name, texts):
    how = {"algorithm": name, "rounds": 1}
    losses = [
        RunFiles(
            run(texts, path, engine={"device": "cpu", "path": path, "group_size": 2}, **how)
        ).rounds()["loss"][-1]
        for path in ("loop", "stack")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] < math.log(20)


@pytest.mark.parametrize("language", [SINGLE, thorough_param(PACKED, id="packed")])
def test_the_models_of_a_finished_run_have_the_logged_scores(language, texts):
    data = tree_of(texts)["data"] | {"language": language}
    finished = open_run(run(texts, "run", rounds=1, algorithm="fedavg", data=data))
    for client in range(2):
        view = finished.client(client)
        x, y = view.test_data()
        assert len(x) == 6  # texts, one in each input
        losses, counts = token_losses(view.model(x).detach(), y)
        loss = finished.array("clients/loss")[-1, client]
        assert float(losses.sum() / counts.sum()) == pytest.approx(loss, rel=1e-6)


def test_a_resume_with_another_language_block_names_the_key_that_differs(texts):
    folder = run(texts, "run", rounds=1, algorithm="fedavg")
    # the run's config does not have the block, because all of it has its defaults
    with pytest.raises(ValueError, match="data.language.packing = True: the run in .* has False"):
        config_to_resume(folder, ["data.language.packing=true"])


# Models of Hugging Face


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_causal_model_has_the_logits_of_transformers(family, tmp_path):
    folder = small_model(tmp_path, family)
    transformers = pytest.importorskip("transformers")
    options = {"folder": str(folder)}
    model = zoo.build("hf", options, 20, (LENGTH,), 1, 20, positions=LENGTH)
    x = torch.randint(0, 20, (3, LENGTH), generator=rng(1, "x"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(x).logits[..., :20]
    found = model.eval_mode()(model.initial, x)
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)
    tied = [name for name in model.leaves if "lm_head" in name]
    assert bool(tied) == (family == "llama")
    stack = {n: torch.stack([v, v]) for n, v in model.initial.items()}
    twice = torch.vmap(lambda tree: model.eval_mode()(tree, x))(stack)
    torch.testing.assert_close(twice[1], found, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="knows 24 tokens; the texts have 30"):
        zoo.build("hf", options, 30, (LENGTH,), 1, 30, positions=LENGTH)
    with pytest.raises(ValueError, match="texts of up to 16 tokens, data.text.length = 40"):
        zoo.build("hf", options, 20, (40,), 1, 20, positions=40)
