"""Texts: from a CSV file to numbers, through the Transformer, to a run folder that can say what it
read.
"""

import csv
import shutil
import sys

import pytest
import torch
from runs import assert_same_run, run_rounds, trees_equal
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

from fedlora_mpi.analysis.run_view import open_run
from fedlora_mpi.config import read
from fedlora_mpi.config.blocks import ConfigError
from fedlora_mpi.core.batch import Batch
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.data.datasets import load
from fedlora_mpi.data.feed import Feed
from fedlora_mpi.data.partition import Iid
from fedlora_mpi.data.source import Source
from fedlora_mpi.data.texts import Text, Vocabulary
from fedlora_mpi.experiment.assembly import build as build_run
from fedlora_mpi.experiment.loop import resume, start
from fedlora_mpi.models import zoo
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import Refusal

pytest.importorskip("tokenizers")

TOPICS = {
    "sea": ("wave", "tide", "salt", "boat"),
    "hill": ("rock", "path", "snow", "goat"),
    "town": ("road", "shop", "tram"),
}
COMMON = ("the", "a", "of", "and", ",")
CPU = torch.device("cpu")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def a_text(number):
    """The topic and the text of a number: 3 to 9 words, some of its topic's."""
    topic = list(TOPICS)[number % 3]
    words, generator = TOPICS[topic] + COMMON, rng(1, "text", number)
    length = 3 + number % 7
    return topic, " ".join(
        words[int(i)] for i in torch.randint(0, len(words), (length,), generator=generator)
    )


@pytest.fixture
def root(tmp_path):
    """A folder with train.csv (60 texts) and test.csv (31), of three topics."""
    for name, numbers in (("train.csv", range(60)), ("test.csv", range(100, 131))):
        write(tmp_path / name, [("id", "topic", "body"), *((n, *a_text(n)) for n in numbers)])
    return tmp_path


def source(root, dataset="csv", **text):
    return Source(
        dataset,
        root=str(root),
        text=Text(**{"label": "topic", "columns": ("body",), "length": 8} | text),
    )


# Texts


TRAINING = ["The boat, the BOAT!", "a goat", "ﬁve goats"]


def words_of(vocabulary, ids):
    """What the library says of the numbers."""
    return [vocabulary.tokenizer.id_to_token(i) for i in ids.tolist()]


def test_a_text_comes_back_as_its_words_in_lower_case():
    vocabulary = Vocabulary.from_texts(TRAINING, Text(length=7))
    ids = vocabulary.encode(TRAINING)
    assert ids.dtype == torch.int32 and ids.shape == (3, 7) and vocabulary.length == 7
    assert words_of(vocabulary, ids[0]) == ["the", "boat", ",", "the", "boat", "!", "[PAD]"]
    # the ligature under NFKC
    assert words_of(vocabulary, ids[2]) == ["five", "goats"] + ["[PAD]"] * 5
    assert ids[0, 6] == 0 and (ids[0, :6] > 1).all()


def test_words_are_numbered_by_frequency_then_by_the_alphabet():
    vocabulary = Vocabulary.from_texts(TRAINING, Text())
    assert vocabulary.size == 10
    in_order = ["[PAD]", "[UNK]", "boat", "the", "!", ",", "a", "five", "goat", "goats"]
    assert words_of(vocabulary, torch.arange(10)) == in_order
    assert Vocabulary.from_texts(TRAINING, Text(vocabulary=4)).size == 4
    assert Vocabulary.from_texts(TRAINING[::-1], Text()).json == vocabulary.json


def test_an_unknown_word_is_1_and_a_long_text_is_cut():
    vocabulary = Vocabulary.from_texts(TRAINING, Text(length=3))
    assert vocabulary.encode(["goat zebra", "", "a a a a a"]).tolist() == [
        [8, 1, 0],
        [0, 0, 0],
        [6, 6, 6],
    ]


def test_no_text_can_spell_padding():
    vocabulary = Vocabulary.from_texts(TRAINING + ["[pad] [UNK]"], Text(length=6))
    assert (vocabulary.encode(["[PAD] [UNK]"]) > 1).all()


def test_a_vocabulary_is_what_its_json_says():
    vocabulary = Vocabulary.from_texts(TRAINING, Text(length=5))
    again = Vocabulary(vocabulary.json)
    assert torch.equal(again.encode(TRAINING), vocabulary.encode(TRAINING))
    assert (again.size, again.length, again.digest()) == (vocabulary.size, 5, vocabulary.digest())


def test_the_vocabulary_is_that_of_the_training_texts(root):
    one = load(source(root))
    write(root / "test.csv", [("id", "topic", "body"), (1, "sea", "whale whale whale wave")])
    two = load(source(root))
    assert two.vocabulary == one.vocabulary and one.tokens == 2 + 11 + len(COMMON)
    assert two.test.x[0, :4].tolist()[:3] == [1, 1, 1] and two.test.x[0, 3] > 1


def test_a_csv_file_gives_texts_and_classes(root):
    data = load(source(root))
    assert data.train.x.shape == (60, 8) and data.test.x.shape == (31, 8) and data.shape == (8,)
    assert data.classes == 3 and torch.bincount(data.train.y).tolist() == [20, 20, 20]
    assert data.train.y[:3].tolist() == [1, 0, 2]  # sea, hill, town: in alphabetical order
    for row in (0, 8, 13):
        words = a_text(row)[1].split()[:8]
        assert words_of(data.vocabulary, data.train.x[row])[: len(words)] == words


def test_labels_that_are_integers_are_sorted_as_such_and_columns_are_joined(tmp_path):
    rows = [
        ("stars", "title", "body"),
        ("10", "a", "b c"),
        ("-2", "", "c"),
        ("9", "b", 'line\nbreak, "quoted"'),
    ]
    for name in ("train.csv", "test.csv"):
        write(tmp_path / name, rows)
    data = load(source(tmp_path, label="stars", columns=("title", "body")))
    assert data.train.y.tolist() == [2, 0, 1]
    assert words_of(data.vocabulary, data.train.x[0])[:3] == ["a", "b", "c"]
    assert words_of(data.vocabulary, data.train.x[2])[:7] == [
        "b",
        "line",
        "break",
        ",",
        '"',
        "quoted",
        '"',
    ]


def test_ag_news_is_read_as_its_authors_wrote_it(tmp_path):
    rows = [
        ("3", "Oil, up", "It costs\\more"),
        ("1", "", "joined"),
        ("4", "Chips", "new"),
        ("2", "Goal", "won"),
    ]
    for name in ("train.csv", "test.csv"):
        write(tmp_path / "AG_NEWS" / name, rows)
    data = load(source(tmp_path, "ag_news"))
    assert data.classes == 4 and data.train.y.tolist() == [2, 0, 3, 1]
    assert words_of(data.vocabulary, data.train.x[0]) == [
        "oil",
        ",",
        "up",
        "it",
        "costs",
        "\\",
        "more",
        "[PAD]",
    ]


# Mistakes


@pytest.mark.parametrize(
    "text, message",
    [
        (
            {"train": "no.csv"},
            r"text.train = no.csv: cannot be read in .* \(No such file or directory\); put it there",
        ),
        (
            {"label": "class"},
            "text.label = class: train.csv has no such column; there are id, topic, body",
        ),
        (
            {"columns": ("body", "title")},
            "text.columns = title: train.csv has no such column; there are id, topic, body",
        ),
        (
            {"test": "odd.csv"},
            "text.test = odd.csv: the label 'moon' is not in train.csv; there are hill, sea, town",
        ),
        ({"train": "short.csv"}, "text.train = short.csv: line 3: has 2 fields, the first row 3"),
        (
            {"train": "header.csv"},
            "text.train = header.csv: has no row under the names of the columns",
        ),
        ({"test": "empty.csv"}, "text.test = empty.csv: is empty, in "),
        ({"test": "latin.csv"}, "text.test = latin.csv: is no CSV file in UTF-8 after line "),
    ],
)
def test_what_is_wrong_with_a_file_is_said(root, text, message):
    header = ("id", "topic", "body")
    write(root / "odd.csv", [header, (1, "moon", "dark")])
    write(root / "short.csv", [header, (1, "sea", "wave"), (2, "sea")])
    write(root / "header.csv", [header])
    (root / "empty.csv").touch()
    (root / "latin.csv").write_bytes("id,topic,body\n1,sea,M\xfcnchen\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"^{message}") as error:
        load(source(root, **text))
    assert "\n" not in str(error.value)


def test_a_row_that_is_not_of_ag_news_is_named(tmp_path):
    write(tmp_path / "AG_NEWS" / "train.csv", [("3", "a", "b"), ("5", "a", "b")])
    with pytest.raises(
        ValueError,
        match="^text.train = train.csv: line 2: must be a class from 1 to 4, a title and",
    ):
        load(source(tmp_path, "ag_news"))


def test_without_the_library_the_message_says_what_to_install(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ValueError, match=r"^text: tokenizers is not installed; pip install 'fedlora-mpi\[text\]'$"
    ):
        load(source(root))


def test_impossible_settings_are_refused(root):
    for text in ({"vocabulary": 2}, {"length": 0}, {"columns": ()}):
        with pytest.raises(ValueError, match=f"^{next(iter(text))} = "):
            Text(**text)
    data = load(source(root))
    split = Iid(clients=2, train=5, test=5).split(data.train.y.numpy(), data.test.y.numpy(), 3)
    with pytest.raises(
        ValueError, match="^data.shift = rotate: needs square images, these are texts; use labels"
    ):
        Feed(data, split, seed=1, shift="rotate", device=CPU, augment=True)


@pytest.mark.parametrize(
    "name, options, tokens, message",
    [
        ("cnn", {}, 9, "cannot be built: it is for images, the data are texts"),
        ("torchvision:resnet18", {}, 9, "cannot be built: it is for images, the data are texts"),
        ("transformer", {}, 0, "cannot be built: it is for texts, the data are images"),
        (
            "transformer",
            {"width": 6, "heads": 4},
            9,
            "cannot be built: heads = 4: must divide width = 6",
        ),
        ("transformer", {"layers": 0}, 9, "cannot be built: layers = 0: must be"),
        ("transformer", {"dropout": 1.0}, 9, "cannot be built: dropout = 1.0: must be"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(name, options, tokens, message):
    shape = (8,) if tokens else (3, 8, 8)
    with pytest.raises(ValueError, match=f"^name = {name}: {message}"):
        zoo.build(name, options, 3, shape, 1, tokens)


def test_hf_without_transformers_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    for folder in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ValueError) as refused:
            zoo.build("hf", {"folder": str(folder)}, 3, (8,), 1, 9)
        message = (
            "name = hf: cannot be built: transformers is not installed; pip install "
            "'fedlora-mpi[hf]'"
        )
        assert str(refused.value) == message


# The network


SMALL = {"width": 6, "heads": 2, "layers": 2, "feedforward": 10}


def network(classes=3, length=9, tokens=20, **options):
    return zoo.build("transformer", SMALL | options, classes, (length,), 1, tokens)


def ids(*lengths, at=9, tokens=20, seed=3):
    """Texts of so many words."""
    x = torch.randint(1, tokens, (len(lengths), at), generator=rng(seed, "ids"))
    return torch.where(torch.arange(at) < torch.tensor(lengths)[:, None], x, 0)


def test_padding_changes_no_logit():
    model = network().eval_mode()
    x = ids(4, 1, 3)
    whole = model(model.initial, x)
    torch.testing.assert_close(model(model.initial, x[:, :4]), whole, rtol=1e-5, atol=1e-6)
    other = model.initial | {
        n: v.clone() for n, v in model.initial.items() if n in ("words.weight", "places.weight")
    }
    other["words.weight"][0] += 3.0  # what stands for padding
    other["places.weight"][4:] -= 2.0  # where nothing but padding is
    assert torch.equal(model(other, x), whole)
    alone = torch.cat([model(model.initial, row[None]) for row in x])
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-6)


def test_padding_has_no_gradient_and_every_word_has_one():
    model, x = network(), ids(4, 1, 3)
    slope = grad(lambda tree: cross_entropy(model(tree, x), torch.tensor([0, 1, 2])))(model.initial)
    seen = torch.zeros(20, dtype=torch.bool).index_fill(0, x[x > 0], True)
    assert torch.equal(slope["words.weight"].abs().sum(1) > 0, seen)
    assert torch.equal(slope["places.weight"].abs().sum(1) > 0, torch.arange(9) < 4)


def test_an_empty_text_has_finite_logits():
    model = network()
    x = model.zero_inputs(5)
    assert x.dtype == torch.int64 and x.shape == (5, 9)
    assert model(model.initial, x).isfinite().all()


def test_the_order_of_the_words_matters():
    model = network().eval_mode()
    x = ids(6)
    assert not torch.allclose(
        model(model.initial, x), model(model.initial, x[:, [1, 0, *range(2, 9)]]), atol=1e-4
    )


def test_evaluation_and_training_mode_agree_to_the_bit():
    model = network()
    x = ids(9, 5, 2)
    with torch.no_grad():  # where torch would take its fused path
        assert torch.equal(model(model.initial, x), model.eval_mode()(model.initial, x))


def test_the_head_is_the_classifier_and_the_norms_are_norms():
    model = network()
    roles = {
        role: {n for n, leaf in model.leaves.items() if leaf.role == role}
        for role in ("head", "norm", "stats")
    }
    assert roles["head"] == {"head.weight", "head.bias"} and not roles["stats"]
    assert len(roles["norm"]) == 10 and all("norm" in name for name in roles["norm"])
    matrices = {
        n.removeprefix("blocks.0.")
        for n, leaf in model.leaves.items()
        if leaf.matrix and "blocks.1" not in n
    }
    attention = {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert matrices == attention | {"linear1.weight", "linear2.weight", "head.weight"}
    x = ids(9, 5, 2)
    features = model.features(model.initial, x)
    assert features.shape == (3, 6)
    assert torch.equal(model.classify(model.initial, features), model(model.initial, x))


def test_flops_are_those_of_the_matrix_products():
    width, length, feedforward = 6, 9, 10
    block = 2 * length * (4 * width**2 + 2 * width * feedforward) + 4 * length**2 * width
    assert network().flops == 2 * block + 2 * width * 3


@pytest.mark.filterwarnings("error")  # torch warns where it has no batching rule
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stack_has_the_gradients_of_the_loop(dropout):
    model = network(dropout=dropout)
    assert model.noisy == (dropout > 0)
    x = torch.stack([ids(9, 5, 2, seed=s) for s in range(4)])
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
            torch.testing.assert_close(stack[name][c], value, rtol=1e-4, atol=1e-6)


# Runs


CONFIG = """
rounds: 3
data:
  dataset: csv
  root: {root}
  text: {{label: topic, columns: [body], length: 8}}
  partition: {{kind: dirichlet_class, alpha: 1.0, clients: 5, minimum: 4}}
model: {{name: transformer, width: 6, heads: 2, layers: 1, feedforward: 10, dropout: 0.1}}
algorithm: {{name: fedlora, lora_epochs: 1, layers: [blocks.*.attention.*, head.*]}}
train: {{epochs: 2, batch_size: 4, lr: 0.05}}
engine: {{device: cpu, path: stack, group_size: 2}}
checkpoint: {{every: 1, keep: 5}}
output: {root}/run
"""


@pytest.fixture
def yaml(root):
    path = root / "text.yaml"
    path.write_text(CONFIG.format(root=root))
    return path


def test_the_low_rank_parts_are_on_attention_and_head(yaml):
    built = build_run(read(yaml), str(yaml), Solo())
    decomposed = {
        n.removesuffix("..A")
        for n in built.federation.clients.types[0].initial.personal
        if n.endswith(".A")
    }
    assert decomposed == {
        "blocks.0.attention.in_proj_weight",
        "blocks.0.attention.out_proj.weight",
        "head.weight",
    }
    assert built.federation.clients.types[0].initial.personal["head.weight..A"].shape == (2, 6)


def test_a_resume_moves_no_bit_and_the_folder_keeps_the_vocabulary(yaml, root):
    assert start(read(yaml), str(yaml), Solo()) == 0
    run, cut = root / "run", root / "cut"
    shutil.copytree(run, cut)
    for round_ in (2, 3):
        shutil.rmtree(cut / "checkpoints" / f"{round_:06d}")
    (cut / "vocabulary.json").unlink()
    assert resume(cut, [], Solo()) == 0
    assert_same_run(run, cut)
    view, data = open_run(cut), load(source(root))
    assert view.vocabulary == data.vocabulary
    texts = [a_text(n)[1] for n in (100, 101, 102)]
    logits = view.client(3).model(view.vocabulary.encode(texts))
    assert logits.shape == (3, 3) and torch.equal(logits, view.client(3).model(data.test.x[:3]))
    x, y = view.client(3).test_data()
    with torch.no_grad():
        accuracy = float((view.client(3).model(x).argmax(1) == y).float().mean())
    assert x.dtype == torch.int64 and accuracy == view.array("clients/accuracy")[-1, 3]


def test_a_resume_on_other_training_texts_is_refused(yaml, root):
    assert start(read(yaml, ["rounds=1"]), str(yaml), Solo()) == 0
    rows = [
        ("id", "topic", "body"),
        *((n, a_text(n)[0], f"{a_text(n)[1]} ashore") for n in range(60)),
    ]
    write(root / "train.csv", rows)
    with pytest.raises(
        Refusal,
        match="run/vocabulary.json: is not that of the training texts in data.root = .*start anew",
    ):
        resume(root / "run", ["rounds=2"], Solo())


def test_the_spread_over_ranks_moves_no_bit(root):
    settings = (
        f"data={{dataset: csv, root: {root}, text: {{label: topic, columns: [body], length: 8}}}}",
        "model={name: transformer, width: 6, heads: 2, layers: 1, feedforward: 10, dropout: 0.1}",
    )
    alone = run_rounds(*settings)[0]
    for moments in run_rounds(*settings, ranks=3):
        for a, b in zip(alone, moments, strict=True):
            assert trees_equal(a.shared, b.shared) and trees_equal(a.personal, b.personal)


@pytest.mark.parametrize(
    "name",
    [
        "fedlora",
        *(pytest.param(n, marks=pytest.mark.thorough) for n in ("fedavg", "fedper", "fedrod")),
    ],
)
def test_a_stack_trains_as_the_loop(yaml, root, name):
    end = {}
    for path in ("stack", "loop"):
        config = read(
            yaml,
            [
                f"algorithm={name}",
                f"engine.path={path}",
                "rounds=2",
                f"output={root}/{name}-{path}",
            ],
        )
        assert start(config, str(yaml), Solo()) == 0
        end[path] = open_run(config.output)
    for leaf, value in end["stack"].shared.items():
        other = torch.from_numpy(end["loop"].shared[leaf])
        torch.testing.assert_close(torch.from_numpy(value), other, rtol=1e-4, atol=1e-5)


def test_topics_are_learnt(yaml, root):
    config = read(
        yaml,
        ["algorithm=fedavg", "model.dropout=0", "model.width=16", "train.epochs=5", "rounds=8"],
    )
    assert start(config, str(yaml), Solo()) == 0
    assert open_run(root / "run").array("accuracy")[-1] > 0.9


def test_a_mistake_in_a_config_of_texts_names_file_and_key(yaml):
    with pytest.raises(
        Refusal, match=r"text.yaml: data.text.label = class: train.csv has no such column"
    ):
        build_run(read(yaml, ["data.text.label=class"]), str(yaml), Solo())
    with pytest.raises(
        Refusal, match=r"text.yaml: model.name = cnn: cannot be built: it is for images"
    ):
        build_run(read(yaml, ["model=cnn"]), str(yaml), Solo())
    with pytest.raises(Refusal, match=r"text.yaml: algorithm.layers = conv.*: matches no weight"):
        build_run(read(yaml, ["algorithm.layers=[conv.*]"]), str(yaml), Solo())
    with pytest.raises(
        ConfigError,
        match="data.text.lenght = 8: data.text has no such field; .* Did you mean length",
    ):
        read(yaml, ["data.text.lenght=8"])
