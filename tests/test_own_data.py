"""A user's own arrays as a data set: from a function, an npz file, or CSV files of numbers."""

import json
import sys

import numpy as np
import pytest
import torch
from runs import build_tiny, run_rounds

from fedlora_mpi import config as configs
from fedlora_mpi import open_run
from fedlora_mpi.data.datasets import load
from fedlora_mpi.data.feed import Feed
from fedlora_mpi.data.own import OwnData
from fedlora_mpi.data.own_checks import check
from fedlora_mpi.data.partition import GivenSplit
from fedlora_mpi.data.source import Source
from fedlora_mpi.data.tables import Table
from fedlora_mpi.mpi.ending import Refusal
from fedlora_mpi.store.reader import RunFiles

MODULE = """
import numpy as np
from torch import nn
from fedlora_mpi.data.own import OwnData

y = np.arange(60) % 3
calls = []


def vectors():
    x = np.random.RandomState(3).randn(60, 5) + y[:, None]
    clients = {"client_train": np.arange(60) // 15, "client_test": np.arange(60) // 15}
    return {"x_train": x, "y_train": y, "x_test": x, "y_test": y} | clients


def images(root):
    x = np.full((60, 8, 8), len(root), np.uint8)
    return OwnData(x, y, x, y)


def drawn():
    return OwnData(np.random.randn(60, 5), y, np.zeros((60, 5)), y)


def differs():
    calls.append(0)
    return OwnData(np.full((60, 5), float(len(calls))), y, np.zeros((60, 5)), y)


def tokens():
    x = np.random.RandomState(3).randint(2, 30, (60, 7))
    return OwnData(x, y, x, y, tokens=40, padding=1)


def breaks():
    raise KeyError("no such file")


def nothing():
    return None


def linear(classes, shape):
    return nn.Linear(shape[0], classes)
"""
IID = "data.partition={kind: iid, clients: 3, train: 10, test: 5}"
GIVEN = "data.partition={kind: given, clients: 4}"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The current folder of a user, with the module ``own_arrays``."""
    (tmp_path / "own_arrays.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_arrays"
    sys.modules.pop("own_arrays", None)


def arrays(**changes):
    """A data set of 6 training and 4 test vectors of 2 features, in 3 classes."""
    entries = {
        "x_train": np.arange(12.0).reshape(6, 2),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": np.arange(8.0).reshape(4, 2),
        "y_test": np.array([0, 1, 2, 1]),
    }
    return OwnData(**entries | changes)


def write_npz(path, **changes):
    entries = {name: value for name, value in arrays(**changes)._asdict().items()}
    np.savez(path, **{name: value for name, value in entries.items() if value is not None})
    return Source("npz", path=str(path))


def first_batch(data):
    """The inputs of all training samples, as a network reads them: [M, ...]."""
    owners = (np.zeros(len(data.train.y), int), np.zeros(len(data.test.y), int))
    split = GivenSplit(clients=1).split(
        data.train.y.numpy(), data.test.y.numpy(), data.classes, owners
    )
    feed = Feed(data, split, seed=1, shift="none", device=torch.device("cpu"), augment=True)
    return feed.unshuffled_batch([0], True).x[0]


# --- what is read


def test_vectors_of_a_function_train_on_their_own_clients(module, call, tmp_path):
    settings = [f"data.dataset={module}:vectors", GIVEN, f"model={module}:linear"]
    (tmp_path / "run.yaml").write_text(
        "rounds: 2\ndata: {dataset: digits, partition: iid}\nmodel: cnn\nalgorithm: fedavg\n"
        "output: run\ntrain: {epochs: 1, batch_size: 5, lr: 0.1}\n"
    )
    assert call("run", "run.yaml", *settings)[0] == 0
    counts = RunFiles(tmp_path / "run").partition()["train_counts"]
    assert counts.tolist() == [[5, 5, 5]] * 4
    assert configs.flatten(configs.read("run/config.yaml"))["data.dataset"] == f"{module}:vectors"
    client = open_run(tmp_path / "run").client(2)
    x, y = client.test_data()
    with torch.no_grad():
        accuracy = (client.model(x).argmax(1) == y).double().mean()
    assert np.float32(accuracy) == client.run.array("clients/accuracy")[-1, 2]
    text = (tmp_path / "own_arrays.py").read_text()
    (tmp_path / "own_arrays.py").write_text(text.replace("y[:, None]", "2 * y[:, None]"))
    sys.modules.pop("own_arrays")
    code, _, error = call("resume", "run", "rounds=3")
    assert code == 2 and "training samples: not the same as when the run began (log.h5)" in error
    assert f"put back what was in data.dataset = {module}:vectors, or start anew" in error
    with pytest.raises(ValueError, match="training samples: not the same as when the run began"):
        open_run(tmp_path / "run").client(2).train_data()


def test_a_function_draws_the_same_on_every_rank(module):
    own = [f"data.dataset={module}:drawn", IID, f"model={module}:linear", "algorithm=fedavg"]
    ranks = run_rounds(*own, "rounds=1", ranks=2)
    alone = run_rounds(*own, "rounds=1")
    for name, value in alone[0][-1].shared.items():
        assert torch.equal(value, ranks[0][-1].shared[name])


def test_a_function_that_differs_between_ranks_is_refused(module):
    own = [f"data.dataset={module}:differs", IID, f"model={module}:linear", "algorithm=fedavg"]
    with pytest.raises(Refusal, match="training samples: not the same as on rank 0") as error:
        run_rounds(*own, ranks=2)
    assert f"data.dataset = {module}:differs must return the same on all ranks" in str(error.value)


def test_a_function_gets_the_folder_and_returns_images(module):
    data = load(Source(f"{module}:images", root="/four"))
    assert data.shape == (1, 8, 8) and int(data.train.x[0, 0, 0, 0]) == len("/four")
    assert data.mean == (5 / 255,) and data.classes == 3 and data.class_names == ()


def test_token_ids_reach_a_transformer_and_the_log(module):
    parts = build_tiny(f"data.dataset={module}:tokens", IID, "model=transformer")
    model = parts.federation.clients.trainer.model
    assert (model.tokens, model.shape, parts.token_settings) == (40, (7,), (40, 1))
    assert f"module {module}" in parts.inventory["code"]


def test_an_npz_file_holds_the_same_as_a_dict(tmp_path):
    data = load(write_npz(tmp_path / "a.npz", mean=[1.0, 2.0], std=2.0, client_train=[7] * 6,
                          client_test=[7] * 4))  # fmt: skip
    assert torch.equal(first_batch(data)[1], torch.tensor([(2 - 1) / 2, (3 - 2) / 2]))
    assert data.owners[0].tolist() == [0] * 6
    assert data.hints == (f"path = {tmp_path}/a.npz: 7 are clients 0 to 0, in this order",)


def test_tables_of_numbers_have_labels_and_clients(tmp_path):
    (tmp_path / "train.csv").write_text("who,a,kind,b\nx,1,red,2.5\ny,3,blue,-1e2\n")
    (tmp_path / "test.csv").write_text("kind,b,who,a\nblue,1,x,0\nred,7,y,8\n")
    source = Source("table", root=str(tmp_path), table=Table(label="kind", client="who"))
    data = load(source)
    assert data.train.x.tolist() == [[1, 2.5], [3, -100]] and data.test.x.tolist()[1] == [8, 7]
    assert data.class_names == ("blue", "red") and data.train.y.tolist() == [1, 0]
    assert [side.tolist() for side in data.owners] == [[0, 1], [0, 1]]


PARQUET = Table("train.parquet", "test.parquet", "kind", "who")


def write_parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    parquet.write_table(pyarrow.table(columns), path)


def test_a_parquet_file_holds_the_same_as_a_csv_file(tmp_path):
    (tmp_path / "train.csv").write_text("who,a,kind,b\n7,1,red,2.5\n9,3,blue,-1e2\n")
    (tmp_path / "test.csv").write_text("kind,b,who,a\nblue,1,7,0\nred,7,9,8\n")
    write_parquet(tmp_path / "train.parquet", who=[7, 9], a=[1, 3], kind=["red", "blue "],
                  b=[2.5, -1e2])  # fmt: skip
    write_parquet(tmp_path / "test.parquet", kind=["blue", "red"], b=[1, 7], who=[7, 9], a=[0, 8])
    csv, parquet = (
        load(Source("table", root=str(tmp_path), table=table))
        for table in (Table(label="kind", client="who"), PARQUET)
    )
    assert torch.equal(csv.train.x, parquet.train.x) and torch.equal(csv.test.x, parquet.test.x)
    assert csv.class_names == parquet.class_names and csv.train.y.tolist() == [1, 0]
    assert [side.tolist() for side in csv.owners] == [side.tolist() for side in parquet.owners]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"a": [1.0, None]}, "table.train = train.parquet: row 2: column a is empty or not finite"),
        ({"a": [1e300, 1.0]}, "row 1: column a is empty or not finite in float32"),
        ({"a": ["x", "y"]}, "column a holds no numbers but string"),
        ({"kind": ["red", " "]}, "row 2: has no kind; give it one, or remove the row"),
        ({"kind": [0.5, 1.0]}, "row 1: 0.5 in column kind must be a text or an integer"),
        ({"who": [1, None]}, "row 2: has no who; give it one, or remove the row"),
    ],
)
def test_a_cell_of_a_parquet_file_that_does_not_fit_is_named(tmp_path, columns, message):
    good = {"a": [1.0, 2.0], "kind": ["red", "blue"], "who": [0, 1]}
    write_parquet(tmp_path / "train.parquet", **(good | columns))
    write_parquet(tmp_path / "test.parquet", **good)
    with pytest.raises(ValueError) as error:
        load(Source("table", root=str(tmp_path), table=PARQUET))
    assert message in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PAR1 no table PAR1", None])
def test_what_is_no_parquet_file_is_one_line(tmp_path, content):
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    if content is not None:
        (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"table.train = train.parquet: cannot be read in .*\("):
        load(Source("table", root=str(tmp_path), table=PARQUET))


def write_leaf(root, side, users, name="all_data_0.json"):
    """Each user has samples of 784 numbers: (label, first number)."""
    data = {
        user: {"x": [[first] + [0.5] * 783 for _, first in rows], "y": [label for label, _ in rows]}
        for user, rows in users.items()
    }
    (root / side).mkdir(exist_ok=True)
    (root / side / name).write_text(json.dumps({"users": [*users], "user_data": data}))


def test_a_folder_of_leaf_holds_users_as_clients(tmp_path):
    write_leaf(tmp_path, "train", {"f2": [(0, 0.25), (1, 1)]}, "all_data_1.json")
    write_leaf(tmp_path, "train", {"f1": [(2, 0.75)]})
    write_leaf(tmp_path, "test", {"f1": [(1, 0)], "f2": [(0, 0)]})
    data = load(Source("leaf", root=str(tmp_path)))
    assert data.train.x.shape == (3, 1, 28, 28)
    assert data.train.x[:, 0, 0, 0].tolist() == [0.75, 0.25, 1]
    assert data.train.y.tolist() == [2, 0, 1] and data.classes == 3
    assert [side.tolist() for side in data.owners] == [[0, 1, 1], [0, 1]]


@pytest.mark.parametrize(
    "train, message",
    [
        (
            {"f1": [(0, 1)], "f3": [(0, 1)]},
            "1 users (first: f3) are in only one of train/ and test/",
        ),
        ({"f1": [(0, "a")]}, "train/: x must be rows of equally many numbers"),
        (None, "there is no file train/*.json; give the folder data/ of a data set of LEAF"),
    ],
)
def test_what_is_not_of_leaf_is_named(tmp_path, train, message):
    write_leaf(tmp_path, "test", {"f1": [(0, 1)]})
    if train:
        write_leaf(tmp_path, "train", train)
    with pytest.raises(ValueError) as error:
        load(Source("leaf", root=str(tmp_path)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is no file of LEAF (JSONDecodeError"),
        ("[]", "is no file of LEAF (TypeError"),
        ('{"users": ["a"], "user_data": {}}', "is no file of LEAF (KeyError: 'a')"),
        (
            '{"users": ["a"], "user_data": {"a": {"x": [[1]], "y": []}}}',
            "has 1 inputs and 0 labels",
        ),
    ],
)
def test_a_file_that_is_not_of_leaf_is_named(tmp_path, content, message):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.json").write_text(content)
    with pytest.raises(ValueError) as error:
        load(Source("leaf", root=str(tmp_path)))
    assert f"data.root = {tmp_path}: train/a.json: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "shape, dtype, becomes",
    [
        ((6, 5, 4), np.uint8, (1, 5, 4)),
        ((6, 5, 4, 3), np.uint8, (3, 5, 4)),
        ((6, 3, 5, 4), np.uint8, (3, 5, 4)),
        ((6, 13, 5, 7), np.float64, (13, 5, 7)),
        ((6, 5, 4, 1), np.float16, (1, 5, 4)),
        ((6, 5), np.float32, (5,)),
        ((6, 5, 4), ">f8", (5, 4)),  # a sequence of vectors
        ((6, 5), np.int16, (5,)),
    ],
)
def test_the_type_and_the_shape_say_what_the_inputs_are(shape, dtype, becomes):
    x = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    y = np.arange(6) % 2
    checked = check(
        OwnData(x, y, torch.from_numpy(x.astype(x.dtype.newbyteorder("="))), y), "k = v"
    )
    assert tuple(checked.train.x.shape[1:]) == becomes
    assert torch.equal(checked.train.x, checked.test.x)
    assert checked.tokens == (30 if dtype is np.int16 else 0)


@pytest.mark.parametrize("top", [255, 1], ids=["bytes", "floats"])
def test_images_of_floats_are_normalised_without_the_255_of_bytes(tmp_path, top):
    x = np.arange(6 * 4 * 4).reshape(6, 1, 4, 4).astype(np.uint8 if top == 255 else np.float32)
    data = load(write_npz(tmp_path / "a.npz", x_train=x, x_test=x[:4], mean=0.25, std=0.5))
    read = first_batch(data)
    assert torch.allclose(read, (torch.from_numpy(x).float() / top - 0.25) / 0.5, atol=1e-4)


@pytest.mark.parametrize(
    "train, test, names, numbers, class_names",
    [
        ([0, 1, 2, 0, 1, 2], [0, 1, 2, 1], None, [0, 1, 2, 0, 1, 2], ()),
        ([9, 10, 3, 9, 9, 9], [3, 3, 9, 10], None, [1, 2, 0, 1, 1, 1], ("3", "9", "10")),
        (list("bacbac"), list("aabc"), None, [1, 0, 2, 1, 0, 2], ("a", "b", "c")),
        ([0, 1, 0, 1, 0, 1], [0, 3, 3, 1], list("wxyz"), [0, 1, 0, 1, 0, 1], tuple("wxyz")),
        (list("xwxwxw"), list("wwzz"), list("zxw"), [1, 2, 1, 2, 1, 2], tuple("zxw")),
        ([[1], [0], [1], [0], [1], [0]], [[0], [1], [0], [1]], None, [1, 0, 1, 0, 1, 0], ()),
    ],
)
def test_labels_count_from_0_and_keep_their_names(train, test, names, numbers, class_names):
    checked = check(arrays(y_train=train, y_test=test, class_names=names), "k = v")
    assert checked.train.y.tolist() == numbers and checked.class_names == class_names
    assert checked.classes == (len(class_names) or len(set(numbers)))
    renumbered = isinstance(train[0], int) and bool(class_names) and not names
    assert bool(checked.hints) == renumbered


# --- what is refused, in one line

X = arrays().x_train
REFUSED = {
    "short labels": ({"y_test": [0, 1]}, r"y_test [2] of int64: x_test has 4 samples; make the"),
    "float labels": ({"y_train": np.zeros(6)}, "y_train [6] of float64: must be [samples] of"),
    "one-hot": ({"y_train": np.eye(6, dtype=int)}, "y_train [6, 6] of int64: must be [samples]"),
    "test label": ({"y_test": [0, 1, 2, 3]}, "y_test has the label 3, which y_train does not"),
    "mixed": ({"y_test": list("abcd")}, "one of y_train and y_test has texts, the other integers"),
    "beyond": ({"class_names": ["a", "b"]}, "y_train has the label 2, and class_names has 2"),
    "twice": ({"class_names": list("aba")}, "class_names a, b, a: name each class once"),
    "nan": ({"x_train": np.where(X == 5, np.nan, X)}, "x_train[2] holds NaN, or a number that"),
    "infinite": ({"x_test": np.full((4, 2), 1e300)}, "x_test[0] holds NaN, or a number that is"),
    "shapes": ({"x_test": np.zeros((4, 3))}, "is [2] of float32 and [3] of float32; make them"),
    "types": ({"x_test": np.zeros((4, 2), int)}, "[2] of float32 and [2] of int32; make them al"),
    "bytes": ({"x_train": X.astype(np.uint8)}, "x_train [6, 2] of uint8: must be uint8 images"),
    "ragged": ({"x_train": [[1.0], [1.0, 2.0]]}, "x_train is no array ("),
    "empty": ({"x_test": np.zeros((0, 2))}, "x_test [0, 2] of float64: must be [samples, ...]"),
    "negative": ({"x_train": -X.astype(int)}, "token ids are from 0 to 2**31 - 2, these from -11"),
    "one side": ({"client_train": [0] * 6}, "has no client_test; give the clients of both sides"),
    "clients": (
        {"client_train": [0] * 6, "client_test": [0]},
        "client_test [1] of int64: x_test has 4 samples; make the two agree",
    ),
    "no std": ({"mean": 1.0}, "has no std; give mean and std, or neither"),
    "zero std": ({"mean": 1.0, "std": [1, 0]}, "std = 1.0, 0.0: must be finite and above 0"),
    "many": ({"mean": [1] * 3, "std": 1}, "mean must be one number, or 2, one for each channel"),
    "padding": ({"padding": 1}, "padding = 1: x_train holds no token ids but float32; leave it"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(changes, message):
    with pytest.raises(ValueError) as error:
        check(arrays(**changes), "dataset = a:b")
    assert str(error.value).startswith("dataset = a:b: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("breaks", "gives no data: KeyError: 'no such file' (own_arrays.py, line "),
        ("nothing", "returned NoneType; return a dict with x_train, y_train, x_test, y_test"),
        ("absent", "gives no data: module 'own_arrays' has no attribute 'absent'"),
        ("y", "gives no data: 'numpy.ndarray' object is not callable"),
    ],
)
def test_a_function_that_gives_no_data_is_one_line(module, call, name, message):
    (config := module + ".yaml")
    with open(config, "w") as file:
        file.write(
            f"data: {{dataset: '{module}:{name}', partition: iid}}\nmodel: cnn\nalgorithm: fedavg\n"
        )
    code, out, error = call("run", config)
    assert (code, out, len(error.splitlines())) == (2, "", 1)
    assert f"{config}: data.dataset = {module}:{name}: {message}" in error


def test_no_pickle_is_read_from_an_npz_file(tmp_path):
    bad = write_npz(tmp_path / "a.npz", y_train=np.array([print] * 6, dtype=object))
    with pytest.raises(ValueError, match=r"path = .*a.npz: y_train is a pickle, which may run"):
        load(bad)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read (No such file or directory); give an npz file"),
        (b"PK\3\4 cut", "is no npz file that can be read ("),
        (b"text", "it is a pickle, which may run anything and is not read"),
    ],
)
def test_a_file_that_is_no_npz_is_refused(tmp_path, content, message):
    file = tmp_path / "a.npz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load(Source("npz", path=str(file)))
    assert str(error.value).startswith(f"path = {file}: ") and message in str(error.value)


def test_an_entry_that_is_missing_or_unknown_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=X, labels=[1])
    with pytest.raises(ValueError, match="has no y_train; there is x_train, labels"):
        load(Source("npz", path=str(tmp_path / "a.npz")))
    np.savez(
        tmp_path / "b.npz", **{n: v for n, v in arrays()._asdict().items() if v is not None}, Y=1
    )
    with pytest.raises(ValueError, match="Y is no entry of a data set; allowed are x_train"):
        load(Source("npz", path=str(tmp_path / "b.npz")))


@pytest.mark.parametrize(
    "rows, message",
    [
        ("a,b,label\n1,2\n", "table.train = train.csv: line 2: has 2 fields, the first row 3"),
        ("a,b,label\n1,x,0\n", "line 2: 'x' in column b is no number"),
        ("a,b,label\n1,nan,0\n", "line 2: holds a number that is not finite in float32"),
        ("a,b,label\n1,2, \n", "line 2: has no label; give it one, or remove the row"),
        ("a,b,y\n1,2,0\n", "table.label = label: train.csv has no such column; there are a, b, y"),
        ("label\n1\n", "table.train = train.csv: has no column of features"),
        ("a,b,label\n", "table.train = train.csv: has no row under the names of the columns"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, rows, message):
    (tmp_path / "train.csv").write_text(rows)
    (tmp_path / "test.csv").write_text("a,b,label\n1,2,0\n")
    with pytest.raises(ValueError) as error:
        load(Source("table", root=str(tmp_path)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dataset": "npz"}, "path = null: dataset = npz needs the path of an npz file"),
        ({"dataset": "mnist", "path": "a"}, "path = a: only dataset = npz has a path"),
        ({"dataset": "mnist", "table": Table(label="y")}, "table: only dataset = table has"),
    ],
)
def test_a_key_of_another_data_set_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Source(**settings)


def test_vectors_are_neither_turned_nor_transformed(module):
    with pytest.raises(ValueError, match=r"augment = \['flip'\]: only images are transformed"):
        load(Source(f"{module}:vectors", augment=("flip",)))
    own = [f"data.dataset={module}:vectors", GIVEN, "algorithm=fedavg"]
    with pytest.raises(Refusal, match="rotate: needs square images, these are numbers"):
        build_tiny(*own, f"model={module}:linear", "data.shift=rotate")
    with pytest.raises(Refusal, match=r"cnn: cannot be built: it is for images, an input .* \[5\]"):
        build_tiny(*own)


def test_a_client_without_test_samples_is_named():
    owners = np.array([0, 1, 2]), np.array([0, 2, 0])
    with pytest.raises(ValueError, match=r"1 of 3 clients \(first: 1\) hold no test sample in the"):
        GivenSplit(clients=3).split(np.zeros(3, int), np.zeros(3, int), 1, owners)


def test_a_block_is_no_data_set(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data: {dataset: {name: npz}, partition: iid}\nmodel: cnn\nalgorithm: fedavg\n")
    with pytest.raises(configs.ConfigError, match="data.dataset = .* must be a name or <module>:"):
        configs.read(path)


def test_a_name_that_is_no_data_set_is_refused_with_the_nearest(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data: {dataset: mnits, partition: iid}\nmodel: cnn\nalgorithm: fedavg\n")
    with pytest.raises(configs.ConfigError, match="instruct or <module>:<function>. Did you mean"):
        configs.read(path)


@pytest.mark.parametrize(
    "train, wanted, targets, y",
    [
        (["1", "1.5"], None, "numbers", [[1], [1.5]]),
        (["1.0", "0.0"], None, "labels", [[1], [0]]),
        (["1", "2"], None, "classes", [0, 1]),
        (["1.5", "red"], None, "classes", [0, 1]),
        (["1", "1.5"], "classes", "classes", [0, 1]),
        (["1", "1.5"], "numbers", "numbers", [[1], [1.5]]),
    ],
)
def test_floats_of_a_table_are_numbers_for_a_loss_that_takes_any(
    tmp_path, train, wanted, targets, y
):
    for name in ("train.csv", "test.csv"):
        rows = "".join(f"0,{label}\n" for label in train)
        (tmp_path / name).write_text(f"a,label\n{rows}")
    data = load(Source("table", root=str(tmp_path)), wanted)
    assert data.targets == targets and data.train.y.tolist() == y


def test_floats_of_a_parquet_file_are_numbers_too(tmp_path):
    write_parquet(tmp_path / "train.parquet", a=[1.0, 2.0], kind=[1.0, 1.5], who=[0, 1])
    write_parquet(tmp_path / "test.parquet", a=[1.0, 2.0], kind=[2.25, 3.0], who=[0, 1])
    for wanted in (None, "numbers"):
        data = load(Source("table", root=str(tmp_path), table=PARQUET), wanted)
        assert data.targets == "numbers" and data.test.y.tolist() == [[2.25], [3]]
