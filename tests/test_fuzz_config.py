"""Whatever a config file or an override holds: it is read, or refused in one line."""

import json
import string
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import TESTS, TINY, json_places

from fedlora_mpi.config import ConfigError, from_dict, read, resolved_dict

FILES = [TINY, *sorted((TESTS.parent / "configs").glob("*.yaml"))]
TREES = [yaml.safe_load(path.read_text()) for path in FILES]
WORDS = st.sampled_from(
    [
        *(
            [
                "seed",
                "rounds",
                "data",
                "model",
                "algorithm",
                "train",
                "engine",
                "name",
                "mix",
                "kind",
                "clients",
                "weights",
                "base",
                "text",
                "classes",
            ]
        ),
        *(
            [
                "cnn",
                "resnet8",
                "hf",
                "fedlora",
                "fedhl",
                "pfedlora",
                "iid",
                "shares",
                "digits",
                "csv",
                "auto",
                "stack",
                "none",
            ]
        ),
        *(["each", "~", ".", "..", "/", "{name}", "{}", "{", "x:y"]),
        *(
            [
                "torchvision:resnet18",
                "torchvision:x",
                "no.such:thing",
                "1e3",
                "0x10",
                "yes",
                "1:30",
                "2020-01-01",
                "<<",
            ]
        ),
    ]
)
EDGES = st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1e308, -0.0])
NUMBERS = st.one_of(st.integers(), st.floats(), EDGES)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
ALWAYS = {
    "deadline": timedelta(seconds=5),
    "suppress_health_check": list(HealthCheck),
    "database": None,
}
FAST = settings(max_examples=150, derandomize=True, **ALWAYS)
LONG = settings(max_examples=3000, **ALWAYS)


@st.composite
def mutated(draw):
    """A config of the repository in which some places are gone, moved or other."""
    tree = json.loads(json.dumps(draw(st.sampled_from(TREES))))
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(sorted(json_places(tree), key=str)))
        home = tree
        for name in where[:-1]:
            home = home[name]
        what = draw(st.sampled_from(["set", "set", "drop", "rename", "add"]))
        if what == "set":
            home[where[-1]] = draw(VALUES)
        elif what == "add" and isinstance(home, dict):
            home[draw(WORDS | st.text(max_size=5))] = draw(VALUES)
        else:
            value = home.pop(where[-1])
            if what == "rename" and isinstance(home, dict):
                home[draw(WORDS)] = value
        if not tree:
            break
    return tree


def is_read_or_refused(path: Path, overrides=()):
    """Read, or one line that names where; and what is read comes back from its resolved form."""
    try:
        config = read(path, overrides)
    except ConfigError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 2000
        return
    again = from_dict(json.loads(json.dumps(resolved_dict(config))), "again")
    assert resolved_dict(again) == resolved_dict(config)


def check_tree(folder: Path, tree):
    path = folder / "config.yaml"
    path.write_text(
        yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass"
    )
    is_read_or_refused(path)


def check_bytes(folder: Path, content: bytes):
    path = folder / "config.yaml"
    path.write_bytes(content)
    is_read_or_refused(path)


def check_override(key: str, value: str):
    is_read_or_refused(TINY, [f"{key}={value}"])


LETTERS = (
    string.ascii_lowercase + string.digits + " \n:-#&*!|>'\"%@`{}[],?~.\t\r\x00\x85\ufeff\ud7ff"
)
ALPHABET = st.text(LETTERS, max_size=120)
RAW = (
    st.binary(max_size=200)
    | ALPHABET.map(lambda text: text.encode())
    | st.tuples(
        st.sampled_from([path.read_bytes() for path in FILES]),
        st.integers(0, 600),
        st.binary(max_size=3),
    ).map(lambda at: at[0][: at[1]] + at[2] + at[0][at[1] + len(at[2]) :])
)
KEYS = st.lists(WORDS | st.text(max_size=4), min_size=1, max_size=3).map(".".join)
OVERRIDES = ALPHABET | VALUES.map(lambda value: json.dumps(value))


BASE = TINY.read_text()
NASTY = [
    "[" * 20000, "a: " + "[" * 3000 + "]" * 3000, "- " * 5000, "seed: " + "1" * 5000, "base: " + "x" * 5000,
    'base: "a\\0b"', BASE.replace("output: run", 'output: "a\\0b"'), BASE.replace("clients: 7", "clients: 1" + "0" * 17),
    BASE + "a: !!python/object/apply:os.system ['touch owned']", "a: &x [1]\nb: *x", BASE.replace("fedlora", "os:system"),
    BASE.replace("name: cnn", "name: hf"), "seed: 1e400", "",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_a_file_that_would_exhaust_or_mislead_the_reader_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        read("config.yaml")
    assert str(refused.value).startswith("config.yaml: ") and "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "text",
    [
        "seed=" + "1" * 5000,
        "x." * 3000 + "y=1",
        "seed=" + "[" * 3000,
        f"model={{mix: [cnn, cnn], clients: [{2**63}, 6]}}",
    ],
    ids=range(4),
)
def test_an_override_that_would_exhaust_the_reader_is_refused(text):
    with pytest.raises(ConfigError, match="^command line: "):
        read(TINY, [text])


@given(tree=mutated())
@FAST
def test_a_valid_config_with_places_that_are_other_is_read_or_refused_in_one_line(
    tmp_path_factory, tree
):
    check_tree(tmp_path_factory.getbasetemp(), tree)


@given(content=RAW)
@FAST
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory, content):
    check_bytes(tmp_path_factory.getbasetemp(), content)


@given(key=KEYS, value=OVERRIDES)
@FAST
def test_any_override_is_read_or_refused_in_one_line(key, value):
    check_override(key, value)


@pytest.mark.slow
@given(tree=mutated())
@LONG
def test_many_valid_configs_with_places_that_are_other(tmp_path_factory, tree):
    check_tree(tmp_path_factory.getbasetemp(), tree)


@pytest.mark.slow
@given(content=RAW)
@LONG
def test_many_bytes(tmp_path_factory, content):
    check_bytes(tmp_path_factory.getbasetemp(), content)


@pytest.mark.slow
@given(key=KEYS, value=OVERRIDES)
@LONG
def test_many_overrides(key, value):
    check_override(key, value)
