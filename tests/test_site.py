"""The site of ``docs/`` builds without a warning, its links lead somewhere, and it needs no
network; and two of its pages are compared with the code: the keys of a config, and the files of a
run.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints
from urllib.parse import unquote, urlsplit

import h5py
import pytest
from runs import TESTS, process_environment

from fedlora_mpi import algorithms, config
from fedlora_mpi.config import blocks
from fedlora_mpi.config.experiment import Config, ModelBlock, Network
from fedlora_mpi.config.method_settings import allowed_values
from fedlora_mpi.config.writing import NETWORK_KEYS
from fedlora_mpi.data.partition import PARTITIONS
from fedlora_mpi.data.source import Source
from fedlora_mpi.data.tasks import Tasks
from fedlora_mpi.models import zoo

DOCS = TESTS.parent / "docs"
ROW = re.compile(r"^\|(.+)\|$", re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    for library in ("sphinx", "myst_parser", "furo", "nbclient", "ipykernel"):
        pytest.importorskip(
            library, reason="the extra [docs] is not installed: pip install 'fedlora-mpi[docs]'"
        )
    folder = tmp_path_factory.mktemp("site")
    line = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        folder / "doctrees",
        DOCS,
        folder / "html",
    ]
    ended = subprocess.run(
        line, env=process_environment(), capture_output=True, text=True, timeout=1800
    )
    assert ended.returncode == 0, ended.stderr
    return folder / "html"


class Page(HTMLParser):
    """The ids of an HTML file, what it links to, and what a browser loads with it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in (
            "index",
            "search",
            "next",
            "prev",
            "canonical",
        ):
            self.loads.append(given["href"])
        elif given.get("src"):
            self.loads.append(given["src"])


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.glob("*.html")}


@pytest.mark.thorough
def test_every_page_is_built(pages):
    assert {path.stem for path in pages} >= {
        path.stem for pattern in ("*.md", "*.ipynb") for path in DOCS.glob(pattern)
    }


@pytest.mark.thorough
def test_links_lead_to_files_and_anchors(pages):
    count = 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme == "https" or link.startswith("http://www.w3.org"), (
                    f"{path.name}: {link}"
                )
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {link}"
            count += 1
    assert count > 500


@pytest.mark.thorough
def test_nothing_comes_from_the_network(site, pages):
    for path, page in pages.items():
        for source in page.loads:
            assert (
                source.startswith("data:") or (site / unquote(urlsplit(source).path)).is_file()
            ), f"{path.name}: {source}"
    for style in site.rglob("*.css"):
        found = re.findall(
            r"(?:url\(|@import )['\"]?(https?:|//)", style.read_text(encoding="utf-8")
        )
        assert not found, f"{style.name} loads {found}"


@pytest.mark.thorough
def test_the_notebook_is_kept_without_outputs_and_shown_with_them(site):
    assert '"outputs": []' in (text := (DOCS / "read_a_run.ipynb").read_text(encoding="utf-8"))
    assert (
        text.count('"outputs": []')
        == text.count('"outputs"')
        == text.count('"execution_count": null')
    )
    shown = (site / "read_a_run.html").read_text(encoding="utf-8")
    assert "data:image/png" in shown and 'class="dataframe"' in shown and "Traceback" not in shown


# --- the keys of a config


_CONSTANTS = {"true": True, "false": False, "null": None}


def cells(page: str, section: str) -> list[list[str]]:
    """The rows of the tables under a heading, without the heads."""
    text = page.partition(f"\n{section}\n")[2]
    assert text, f"there is no heading {section}"
    text = re.split(r"^#+ ", text, flags=re.MULTILINE)[0]
    rows = [[cell.strip() for cell in row.split("|")] for row in ROW.findall(text)]
    return [row for row in rows if row[0].startswith("`")]


def keys(cls: type, above: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, default) of a block's fields and of the blocks in it."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        if field.metadata == blocks.NO_KEY:
            continue
        inner = [
            part for part in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(part)
        ]
        if inner and field.name not in ("data", "model", "mix"):
            yield from keys(inner[0], f"{above}{field.name}.")
        else:
            yield f"{above}{field.name}", field.default


def known() -> dict[str, object]:
    """{dotted key: default} of every key but those of partitions, networks and methods."""
    found = dict(keys(Config))
    del found["data"], found["model"]
    found |= dict(keys(Source, "data.")) | dict(keys(Tasks, "data.tasks."))
    found |= dict(keys(ModelBlock, "model."))
    return found | {
        "model.name": None,
        **{f"model.{key}": getattr(Network, key) for key in NETWORK_KEYS},
        "data.partition.kind": None,
    }


def written(value: object) -> str:
    """A default as the page writes it."""
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    named = next((name for name, constant in _CONSTANTS.items() if value is constant), value)
    return f"`{named}`"


def test_the_page_of_the_config_has_every_key_with_its_default():
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    sections = [
        name
        for name in re.findall(r"^(##+ .+)$", page, re.MULTILINE)
        if name != "### data.partition"
    ]
    rows = {row[0].strip("`"): row[1] for name in sections for row in cells(page, name)}
    for key, default in known().items():
        assert key in rows, f"docs/configuration.md has no row `{key}`, its default is {default}"
        if rows[key]:  # of the others one must be given
            assert rows[key] == written(default), (
                f"docs/configuration.md: `{key}` is {rows[key]}, its default {default}"
            )
    gone = {key for key in rows if re.fullmatch(r"(\w+\.)+\w+", key)} - known().keys()
    # of the blocks, which have tables of their own
    assert gone == {"data.synthetic", "data.text", "data.table", "data.language", "data.tasks"}


def bounds(cls: type, above: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, its values in words) of a block's choices and of its numbers with bounds, and of
    the blocks in it.
    """
    hints, words = get_type_hints(cls), allowed_values(cls)
    for name, hint in hints.items():
        for part in (hint, *get_args(hint)):
            if is_dataclass(part) and name not in ("data", "model", "mix"):
                yield from bounds(part, f"{above}{name}.")
        if get_origin(hint) is Literal or re.search(r"of at least|above|from", words.get(name, "")):
            yield f"{above}{name}", words[name]


def test_the_page_of_the_config_says_what_every_key_allows():
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    partition = page.index("### data.partition"), page.index("### data.synthetic")
    page = page[: partition[0]] + page[partition[1] :]  # its table names the kinds of a key
    rows = dict(re.findall(r"^\| `([\w.]+)` \|[^|]*\| ([^|]*) \|", page, re.MULTILINE))
    expected = dict([*bounds(Config), *bounds(Source, "data."), *bounds(Tasks, "data.tasks.")])
    assert len(expected) > 30 and expected["train.momentum"] == "a number from 0 to below 1"
    for key, words in expected.items():
        assert rows[key] == words, f"docs/configuration.md: `{key}` allows {words}, not {rows[key]}"


def test_every_key_of_a_resolved_config_is_on_the_page():
    resolved = config.flatten(config.read(TESTS.parent / "configs/quickstart.yaml"))
    # of the kind, the network and the method: tested apart
    elsewhere = ("data.partition.", "model.", "algorithm.")
    assert {key for key in resolved if not key.startswith(elsewhere)} <= known().keys()


def test_the_page_of_the_config_has_every_partition_and_network():
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    rows = cells(page, "### data.partition")
    assert [row[0].strip("`") for row in rows if len(row) == 2] == list(PARTITIONS)
    named = {name: row for row in rows if len(row) == 4 for name in re.findall(r"`(\w+)`", row[0])}
    for kind, cls in PARTITIONS.items():
        for name in blocks.config_fields(cls):
            row = named[name]
            assert row[2].startswith("all") or f"`{kind}`" in row[2], f"`{name}` is of {kind} too"
    text = " ".join(" ".join(row) for row in cells(page, "## model"))
    for name, builder in zoo.BUILDERS.items():
        assert f"`{name}`" in text or re.fullmatch(r"cnn\d", name), name
        for option, field in blocks.keyword_fields(builder).items():
            assert f"`{option}: {field.default}`" in text or f"`{option}`" in text, (
                f"{name}: {option}"
            )


# --- the files of a run


@pytest.fixture
def run(trained) -> Path:
    """A run of a method that keeps something on the server and something at the clients."""
    return trained()


def there(path: Path) -> dict[str, list[str]]:
    """{dataset: [axes, type, unit]} of an HDF5 file."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item}) if isinstance(item, h5py.Dataset) else None
            )
        )

        def about(ds):
            return [
                ", ".join(d.label for d in ds.dims if d.label),
                str(ds.dtype),
                str(ds.attrs.get("unit", "")),
            ]

        return {name: about(dataset) for name, dataset in found.items()}


def test_the_page_of_the_formats_has_every_dataset_of_the_log(run):
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    sections = ("### /rounds", "### /clients", "### /ranks", "### /partition", "### Checksums")
    rows = [row for name in sections for row in cells(page, name)]
    assert {row[0].strip("`"): row[1:4] for row in rows} == there(run / "log.h5")


def test_the_page_of_the_formats_has_every_file_and_dataset_of_a_checkpoint(run):
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    rows = {
        (file.strip("`"), dataset.strip("`").partition("/")[0])
        for file, dataset, *_ in cells(page, "## checkpoints")
        if "." in file
    }
    found = set()
    folder = run / "checkpoints/000002"
    for path in folder.glob("*.h5"):
        if path.name != "log.h5":
            found |= {
                (re.sub(r"\d{4}", "0001", path.name), name.partition("/")[0])
                for name in there(path)
            }
    assert found | {("server.h5", "server")} == rows
    listed = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1]
    for path in [*run.iterdir(), *folder.iterdir()]:
        name = re.sub(r"worker-\d{4}", "worker-0001", path.name)
        assert name in listed, f"docs/formats.md does not list {name}"


def test_the_page_of_the_formats_has_every_attribute(run):
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    for path in (run / "log.h5", *(run / "checkpoints/000002").glob("*.h5")):
        with h5py.File(path) as file:
            for name in [*file.attrs, *file.get("partition", file).attrs]:
                assert f"`{name}`" in page, f"{path.name}: {name}"


# --- the methods


@pytest.mark.parametrize("name", algorithms.algorithm_names())
def test_every_method_has_an_equation(name):
    text = sys.modules[algorithms.find_algorithm(name).__module__].__doc__
    equations = [
        line
        for line in text.splitlines()
        if line.startswith("    ") and re.search(r"<-|=|<=", line)
    ]
    assert equations, f"{name}: its docstring has no indented line with an equation"
