"""What is tried of a user's network before a run: does its batch count, does a stack of clients
give what one by one gives?
"""

import csv
from dataclasses import replace

import numpy as np
import pytest
import runs
import small
import torch
import torch.nn.functional as F
from runs import TINY, run_outcome, run_rounds, tiny_config
from torch import nn

from fedlora_mpi import cli
from fedlora_mpi import config as configs
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.engine.rehearsal import find_objection
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.models import zoo
from fedlora_mpi.models.coupling import couples_examples
from fedlora_mpi.models.network import from_module
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import Refusal
from fedlora_mpi.store.log import Log

HERE = "test_rehearsal"
thorough = pytest.mark.thorough
SHAPE = (1, 8, 8)


class Mid(nn.Module):
    """A convolution, an optional norm, something in between, a head."""

    def __init__(self, classes, shape, between=None, norm=None, gate=False):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(shape[0], 3, 3, padding=1), norm or nn.Identity()
        self.gate = nn.Parameter(torch.zeros(1)) if gate else None
        self.between, self.head = (
            between or (lambda y: y),
            nn.Linear(3 * shape[1] * shape[2], classes),
        )

    def forward(self, x):
        y = self.norm(self.conv(x)).flatten(1)
        z = self.between(y)
        return self.head(z if self.gate is None else y + self.gate * z)


def of(**parts):
    return lambda classes, shape: Mid(
        classes, shape, **{n: v() if n == "norm" else v for n, v in parts.items()}
    )


def attend(y):
    return F.scaled_dot_product_attention(y[None], y[None], y[None])[0]


COUPLED = {
    "batch_statistics": of(norm=lambda: nn.BatchNorm2d(3, track_running_stats=False)),
    "instance_statistics": of(norm=lambda: nn.InstanceNorm2d(3, track_running_stats=True)),
    "centred": of(between=lambda y: y - y.mean(0)),
    "gated": of(between=lambda y: y - y.mean(0), gate=True),
    "scaled": of(between=lambda y: y / y.norm()),
    "normalised": of(between=lambda y: F.normalize(y, dim=0)),
    "sorted_": of(between=lambda y: y.sort(0).values),
    "softmax": of(between=lambda y: y.softmax(0)),
    "largest": of(between=lambda y: y / y.abs().max()),
    "attending": of(between=attend),
    "summed": of(between=lambda y: y.cumsum(0)),
    "numbered": of(between=lambda y: y * torch.arange(len(y))[:, None]),
    "counted": of(between=lambda y: y / len(y)),
    "rolled": of(between=lambda y: y + y.roll(1, 0)),
}
APART = {
    "plain": of(between=F.relu),
    "norm": of(norm=lambda: nn.BatchNorm2d(3)),
    "group": of(norm=lambda: nn.GroupNorm(1, 3)),
    "instance": of(norm=lambda: nn.InstanceNorm2d(3)),
    "row": of(between=lambda y: F.normalize(y, dim=1)),
    "dropout": of(norm=lambda: nn.Dropout2d(0.4)),
}
globals().update(COUPLED | APART)  # a config names them


@pytest.mark.parametrize("name", [*COUPLED, *APART])
def test_a_network_that_computes_across_its_batch_is_known(name):
    torch.manual_seed(0)
    assert couples_examples(from_module((COUPLED | APART)[name](4, SHAPE), 4, SHAPE), 1) == (
        name in COUPLED
    )


def test_what_this_package_brings_computes_of_each_example_apart():
    for name in (
        "cnn",
        "cifar_resnet8",
        "transformer",
        "vit",
        "user_parts:with_norm",
        "user_parts:small_vit",
        "small:noisy_net",
    ):
        texts = name == "transformer"
        shape, tokens = ((5,), 11) if texts else ((3, 8, 8), 0)
        model = zoo.build(name, {"dropout": 0.1} if texts else {}, 3, shape, 1, tokens)
        assert not couples_examples(model, 1), name


def test_the_trial_reads_no_global_generator():
    before = torch.get_rng_state()
    zoo.build(f"{HERE}:dropout", {}, 4, SHAPE, 1)
    assert torch.equal(before, torch.get_rng_state())


def ends(*overrides):
    """Accuracies, losses and shared leaves at the end."""
    common = ("data.partition.clients=4", "rounds=2", "participation=1.0", "algorithm=fedavg")
    last = run_rounds(*common, *overrides)[0][-1]
    return last.shared, last.clients["accuracy"], last.clients["loss"]


def same(a, b):
    return runs.trees_equal(a[0], b[0]) and all(
        np.array_equal(x, y, equal_nan=True) for x, y in zip(a[1:], b[1:], strict=True)
    )


@pytest.mark.parametrize(
    "name", ["batch_statistics", *(pytest.param(n, marks=thorough) for n in ("centred", "softmax"))]
)
def test_no_padding_enters_a_network_that_computes_across_its_batch(name, capsys):
    model = f"model={HERE}:{name}"
    one = ends(model, "engine.path=loop", "engine.group_size=1")
    for size in (2, 4):
        assert same(one, ends(model, "engine.path=stack", f"engine.group_size={size}"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hint")]
    assert len(said) == 2 and all(
        "engine.path = stack" in line and "although a stack" in line for line in said
    )
    assert "across the examples of a batch" in said[0]


@pytest.mark.parametrize(
    "method",
    [pytest.param(("fml", "centred"), marks=thorough), ("fedapen", "batch_statistics")],
    ids=("fml", "fedapen"),
)
def test_padding_enters_no_companion_either(method, capsys):
    name, small = method
    given = [f"algorithm={{name: {name}, small: '{HERE}:{small}'}}", "train.lr=0.02"]
    loop, stack = (
        ends(*given, f"engine.path={path}", "engine.group_size=2") for path in ("loop", "stack")
    )
    assert same(loop, stack)
    assert "has other gradients or results in a stack" in capsys.readouterr().err


@pytest.mark.parametrize("tests", [(1,), (1001,), (2000,)])
def test_a_coupled_batch_is_judged_in_equal_parts(tests, monkeypatch):
    made = small.make_trainer(FedAvg(), samples=small.make_feed(sizes=(7,), tests=tests))
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(105, track_running_stats=False), nn.Linear(105, small.CLASSES)
    )
    model = from_module(net, small.CLASSES, small.SHAPE)
    made = replace(made, model=replace(model, couples=couples_examples(model, 1)))
    assert made.model.couples
    (score,) = made.evaluate([0], model.initial, {})
    n = tests[0]
    x, y = (v[0] for v in made.feed.test_batch([0], 0, n)[:2])
    parts = [range(n)] if n <= 1000 else [range(0, n // 2), range(n // 2, n)]
    if n == 1:
        expected = model.initial["2.bias"][None]  # what one example is normalised to is zero
    else:
        expected = torch.cat([net.eval()(x[part.start : part.stop]) for part in parts])
    assert score[0] == (expected.argmax(1) == y).double().mean()
    assert float(score[1]) == pytest.approx(F.cross_entropy(expected, y).item(), rel=1e-5)


# Texts


class Words(nn.Module):
    """Embedded words, a core, a head on the mean."""

    def __init__(self, classes, tokens, core=None, **options):
        super().__init__()
        self.words, self.core, self.head = (
            nn.Embedding(tokens, 6, **options),
            core,
            nn.Linear(6, classes),
        )

    def forward(self, x):
        z = self.words(x)
        if isinstance(self.core, nn.RNNBase):
            z = self.core(z)[0]
        return self.head(z.mean(1))


class Packed(Words):
    """An LSTM over packed sequences."""

    def forward(self, x):
        lengths = (x != 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.words(x), lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.core(packed)[1][0][-1])


class Masked(Words):
    """A Transformer encoder of torch with a padding mask."""

    def forward(self, x):
        return self.head(self.core(self.words(x), src_key_padding_mask=x == 0)[:, 0])


class Branching(Words):
    """Control flow that depends on data."""

    def forward(self, x):
        z = self.words(x).mean(1)
        return self.head(z * 2 if self.head.bias.sum() > 100 else z)


class Item(Words):
    """A number taken out of a tensor."""

    def forward(self, x):
        return self.head(self.words(x).mean(1) * (1 + self.head.bias.sum().item()))


def lstm(classes, shape, tokens):
    return Words(classes, tokens, nn.LSTM(6, 6, batch_first=True), padding_idx=0)


def gru(classes, shape, tokens):
    return Words(classes, tokens, nn.GRU(6, 6, batch_first=True))


def packed(classes, shape, tokens):
    return Packed(classes, tokens, nn.LSTM(6, 6, batch_first=True))


def encoder(classes, shape, tokens):
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)
    return Masked(classes, tokens, nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


def nested(classes, shape, tokens):
    return Masked(
        classes,
        tokens,
        nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), 1),
    )


def sparse(classes, shape, tokens):
    return Words(classes, tokens, sparse=True)


def dense(classes, shape, tokens):
    return Words(classes, tokens)


def bounded(classes, shape, tokens):
    return Words(classes, tokens, max_norm=0.5)


def with_padding(classes, shape, tokens):
    return Words(classes, tokens, padding_idx=0)


def branching(classes, shape, tokens):
    return Branching(classes, tokens)


def item(classes, shape, tokens):
    return Item(classes, tokens)


FAILING = ("lstm", "gru", "packed", "nested", "sparse", "branching", "item")
CONFIG = """
seed: 1
rounds: 2
output: run
data: {dataset: csv, root: ., text: {label: topic, columns: [body], length: 6}, partition: {kind: iid, clients: 4, train: 9, test: 3}}
model: {name: "test_rehearsal:dense"}
algorithm: fedavg
train: {epochs: 1, batch_size: 4, lr: 0.1}
engine: {device: cpu}
"""


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder with a config and texts of two topics, in which the test runs."""
    pytest.importorskip("tokenizers")
    for name, count in (("train.csv", 40), ("test.csv", 15)):
        with open(tmp_path / name, "w", newline="") as file:
            rows = (
                (f"t{n % 2}", " ".join(f"w{(n * k) % 11}{n % 2}" for k in range(1, 2 + n % 6)))
                for n in range(count)
            )
            csv.writer(file).writerows([("topic", "body"), *rows])
    (tmp_path / "c.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran(texts, name, *overrides):
    """What a run of a text network ends in."""
    folder = texts / "-".join((name, *(o.rpartition("=")[2] for o in overrides)))
    assert cli.main(["run", "c.yaml", f"model={HERE}:{name}", f"output={folder}", *overrides]) == 0
    return run_outcome(folder)


@pytest.mark.parametrize(
    "name", [n if n in ("lstm", "item") else pytest.param(n, marks=thorough) for n in FAILING]
)
def test_a_network_that_no_stack_can_train_takes_the_loop_with_one_hint(name, texts, capsys):
    loop = ran(texts, name, "engine.path=loop")
    assert "engine.path" not in capsys.readouterr().err
    np.testing.assert_equal(ran(texts, name), loop)
    assert configs.read(texts / name / "config.yaml").engine.path == "loop"
    said = capsys.readouterr().err
    assert (
        said.count("hint: engine.path = auto: ") == 1
        and f"{HERE}:{name} cannot train in a stack" in said
    )
    assert (
        cli.main(["run", "c.yaml", f"model={HERE}:{name}", "engine.path=stack", "output=refused"])
        == 2
    )
    said = capsys.readouterr().err
    assert (
        said.startswith(f"fedlora-mpi: c.yaml: engine.path = stack: {HERE}:{name} cannot train")
        and said.count("\n") == 1
    )
    assert not (texts / "refused").exists()


class Rows(nn.Module):
    """The rows of an image as a sequence for a recurrent layer."""

    def __init__(self, layer, classes, shape):
        super().__init__()
        self.layer = layer(shape[2], 5, batch_first=True)
        self.head = nn.Linear(5, classes)

    def forward(self, x):
        return self.head(self.layer(x[:, 0])[0][:, -1])


def lstm_of_rows(classes, shape):
    return Rows(nn.LSTM, classes, shape)


def gru_of_rows(classes, shape):
    return Rows(nn.GRU, classes, shape)


def rnn_of_rows(classes, shape):
    return Rows(nn.RNN, classes, shape)


class Picking(Mid):
    """Reads numbers of its features."""

    def forward(self, x):
        return self.head(self.conv(x).flatten(1)) * (1 if x.sum() > 0 else 2)


def picking(classes, shape):
    return Picking(classes, shape)


class Bags(nn.Module):
    """Pixels as words of bags; vmap computes an EmbeddingBag for one client after another."""

    def __init__(self, classes, shape):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 5), nn.Linear(5, classes)

    def forward(self, x):
        return self.head(self.bag((3 * x.flatten(1)).long().clamp(0, 8)))


def bags(classes, shape):
    return Bags(classes, shape)


NO_RULE = "torch.func.vmap has no rule for aten::"


@pytest.mark.parametrize(
    "name, reason",
    [
        ("lstm_of_rows", f"{NO_RULE}lstm"),
        pytest.param("gru_of_rows", f"{NO_RULE}gru", marks=thorough),
        pytest.param("rnn_of_rows", f"{NO_RULE}rnn_tanh", marks=thorough),
        ("picking", "it reads numbers of a tensor, for .item() or a condition"),
    ],
)
def test_the_hint_says_briefly_why_a_stack_is_impossible(name, reason, capsys):
    build(tiny_config(f"model={HERE}:{name}", "engine.path=auto"), "c", Solo())
    assert capsys.readouterr().err == (
        f"hint: engine.path = auto: {HERE}:{name} cannot train in a stack ({reason}); clients "
        "train one by one (engine.path=loop says so from the start)\n"
    )


def test_what_a_stack_computes_one_by_one_stays_in_it_without_a_warning(capsys, recwarn):
    assembly = build(tiny_config(f"model={HERE}:bags", "engine.path=auto"), "c", Solo())
    assert assembly.config.engine.path == "stack"
    run_rounds(f"model={HERE}:bags", "rounds=1")
    assert not [w for w in recwarn if "performance drop" in str(w.message)]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["picking", pytest.param("lstm_of_rows", marks=thorough)])
def test_a_network_that_torch_cannot_compile_is_refused_before_a_run(name, tmp_path, capsys):
    which = (f"model={HERE}:{name}", "engine.path=loop", "engine.compile=true")
    assert cli.main(["run", str(TINY), *which, f"output={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert f"engine.compile = true: {HERE}:{name} cannot be compiled (" in said
    assert said.endswith("); set engine.compile=false\n") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_stack_with_other_gradients_takes_the_loop(texts, capsys):
    assert not zoo.build(f"{HERE}:with_padding", {}, 2, (6,), 1, 20).couples
    loop = ran(texts, "with_padding", "engine.path=loop")
    for path in ("auto", "stack"):
        np.testing.assert_equal(ran(texts, "with_padding", f"engine.path={path}"), loop)
    assert (
        capsys.readouterr().err.count("has other gradients or results in a stack than one by one")
        == 2
    )


@pytest.mark.parametrize("name", ["dense", "encoder"])
def test_a_stack_that_does_the_same_stays(name, texts, capsys):
    stack, loop = (ran(texts, name, f"engine.path={path}")["rounds"] for path in ("auto", "loop"))
    assert configs.read(texts / f"{name}-auto" / "config.yaml").engine.path == "stack"
    assert "hint: engine.path" not in capsys.readouterr().err
    np.testing.assert_allclose(stack["train_loss"], loop["train_loss"], rtol=1e-5)


def test_measuring_takes_the_loop_and_says_so_once(texts, capsys):
    np.testing.assert_equal(
        ran(texts, "lstm", "engine.path=measure"), ran(texts, "lstm", "engine.path=loop")
    )
    said = capsys.readouterr().err
    assert said.count("hint: engine.path = measure: ") == 1 and "samples per second" not in said


@pytest.mark.parametrize("more", [[], pytest.param(["--gpus", "h200"], marks=thorough)])
def test_plan_says_it_too(more, texts, capsys):
    assert cli.main(["plan", "c.yaml", f"model={HERE}:lstm", *more]) == 0
    said = capsys.readouterr()
    assert said.err.count("hint: engine.path = auto: ") == 1 and "loop on" in said.out


def test_sparse_gradients_train_as_dense_ones(texts):
    sparse, dense = (
        ran(texts, name, "engine.path=loop", "train.momentum=0.9") for name in ("sparse", "dense")
    )
    assert sparse["shared"] == dense["shared"]


@pytest.mark.parametrize("name", [pytest.param("lstm", marks=thorough), "bounded"])
def test_all_ranks_take_the_loop(name, texts, capsys):
    config = configs.read("c.yaml", [f"model={HERE}:{name}", "engine.group_size=2"])

    def moments(comm):
        built = build(config, "c.yaml", comm)
        state = runs.initial_state(built)
        for _ in range(2):
            state, *_ = runs.run_round(built.federation, state, evaluate=True, stop=False)
        return built.config.engine.path, runs.clone_tree(state.shared)

    (path, one), *others = [end for ranks in (1, 2, 3) for end in runs.run_on_ranks(ranks, moments)]
    assert path == "loop" and all(
        path == "loop" and runs.trees_equal(one, shared) for path, shared in others
    )
    assert capsys.readouterr().err.count("hint: engine.path") == 3


def test_a_network_that_writes_to_its_weights_leaves_those_of_others(texts):
    built = build(configs.read("c.yaml", [f"model={HERE}:bounded"]), "c.yaml", Solo())
    trainer, first = built.federation.clients.trainer, built.federation.clients.types[0].initial
    assert trainer.model.effects.written_parameters
    shared = {n: 3 * v for n, v in first.shared.items()}
    before = runs.clone_tree(shared)
    trainer.evaluate([0, 1], shared, {})
    (done,) = trainer.train([0], shared, {}, 0)
    assert runs.trees_equal(shared, before)
    assert not torch.equal(done.end.shared["words.weight"], before["words.weight"])


class Stubborn(torch.autograd.Function):
    """Has no gradient of a batch of more than a few."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if len(grad) > 4:
            raise RuntimeError("no gradient\nof this")
        return grad


def stubborn(classes, shape):
    return Mid(classes, shape, Stubborn.apply)


@pytest.mark.parametrize("path", ["auto", "loop", "stack"])
def test_a_network_that_never_trains_is_refused_in_one_line(path, tmp_path, capsys):
    given = [
        str(TINY),
        f"model={HERE}:stubborn",
        f"engine.path={path}",
        f"output={tmp_path / 'run'}",
    ]
    assert cli.main(["run", *given]) == 2
    said = capsys.readouterr().err
    assert (
        said.endswith("one step of local training fails: RuntimeError: no gradient of this\n")
        and said.count("\n") == 1
    )
    assert not (tmp_path / "run").exists()


def test_a_network_that_is_known_needs_no_trial(monkeypatch):
    monkeypatch.setattr(
        "fedlora_mpi.experiment.engine_choice.rehearse_engine", lambda *given: pytest.fail("tried")
    )
    build(tiny_config(), str(TINY), Solo())
    with pytest.raises(pytest.fail.Exception):
        build(tiny_config("model=user_parts:wide"), str(TINY), Solo())


def test_a_trial_leaves_no_trace():
    built = runs.build_tiny("model=user_parts:with_norm")
    client_type = built.federation.clients.types[0]
    before = (
        runs.clone_tree(client_type.initial.shared),
        runs.clone_tree(client_type.initial.personal),
        runs.clone_tree(client_type.trainer.model.initial),
    )
    assert find_objection(client_type.trainer, client_type.initial) is None
    assert all(
        map(
            runs.trees_equal,
            before,
            (
                client_type.initial.shared,
                client_type.initial.personal,
                client_type.trainer.model.initial,
            ),
        )
    )


# Predictions that are no numbers


class Undefined(nn.Module):
    """nan for the inputs whose sum is positive, when it is judged."""

    def __init__(self, classes, shape):
        super().__init__()
        self.head = nn.Linear(shape[1] * shape[2], classes)

    def forward(self, x):
        logits = self.head(x.flatten(1))
        if self.training:
            return logits
        return torch.where(x.flatten(1).sum(1, keepdim=True) > 0, float("nan"), logits)


def undefined(classes, shape):
    return Undefined(classes, shape)


def infinite(classes, shape):
    net = nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], classes))
    net[1].register_forward_hook(lambda module, given, out: out if module.training else 1e39 * out)
    return net


@pytest.mark.parametrize("path", [pytest.param("loop", marks=thorough), "stack"])
def test_a_prediction_that_is_no_number_is_wrong(path, tmp_path, capsys):
    given = [f"model={HERE}:undefined", "algorithm=fedavg", f"engine.path={path}", "rounds=1"]
    assert cli.main(["run", str(TINY), *given, f"output={tmp_path / 'run'}"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "no numbers" in line]
    assert len(said) == 1 and said[0].startswith(
        "fedlora-mpi: round 1: client 0, 2, 3, 4, 5, 6: logits"
    )
    built = runs.build_tiny(*given)
    files = runs.RunFiles(tmp_path / "run")
    accuracy, loss = (files.clients()[name][-1] for name in ("accuracy", "loss"))
    trainer, shared = built.federation.clients.trainer, runs.run_rounds(*given)[0][-1].shared
    nan = np.zeros(7)
    for client in range(7):
        x, y = (
            v[0] for v in trainer.feed.test_batch([client], 0, trainer.feed.test_size(client))[:2]
        )
        logits = trainer.model.eval_mode()(shared, x)
        real = ~logits.isnan().any(1)
        nan[client] = 1 - real.double().mean()
        assert accuracy[client] == pytest.approx(
            float(((logits.argmax(1) == y) & real).double().mean()), abs=1e-6
        )
    assert (np.isnan(loss) == (nan > 0)).all() and 0 < nan.mean() < 1
    assert files.rounds()["nan_predictions"][-1] == pytest.approx(nan.mean(), abs=1e-6)


def test_an_infinite_logit_is_a_prediction():
    row = run_rounds(f"model={HERE}:infinite", "algorithm=fedavg", "rounds=1")[0][-1].row
    assert row["nan_predictions"] == 0 and row["accuracy"] > 0.3


def test_pretraining_says_so(tmp_path, capsys):
    pytest.importorskip("safetensors")
    given = [
        "pretrain",
        str(TINY),
        f"model={HERE}:undefined",
        "--epochs",
        "1",
        "--to",
        str(tmp_path / "a.safetensors"),
    ]
    assert cli.main(given) == 0
    said = capsys.readouterr()
    assert "% of the test samples are no numbers (nan); these count as wrong" in said.err
    nan = float(said.err.partition("logits of ")[2].partition("%")[0])
    assert 0 < float(said.out.partition("accuracy ")[2].partition("%")[0]) <= 100 - nan


def test_a_log_of_before_goes_on_without_the_column(tmp_path):
    described = {"config_yaml": "", "config_json": "", "versions": {}, "partition": {}}
    row, clients = {"accuracy": 0.5}, {"accuracy": np.ones(2)}
    with Log.create(tmp_path / "log.h5", clients=2, **described) as log:
        log.append(1, row, clients)
    with Log.reopen(tmp_path / "log.h5") as log:
        log.append(2, row | {"nan_predictions": 0.0}, clients)
        with pytest.raises(AssertionError, match="not in every row"):
            log.append(3, row | {"other": 0.0}, clients)


def test_a_refusal_reaches_all_ranks():
    config = tiny_config(f"model={HERE}:stubborn")
    with pytest.raises(Refusal, match="one step of local training fails"):
        runs.run_on_ranks(2, lambda comm: build(config, str(TINY), comm))
