"""``docs/methods.md`` says what the code does: its tables, its formulas and its example."""

import re
import runpy
import shlex
import shutil
import sys

import pytest
from runs import TESTS, built, command, equal, finished, played

from fedlora_mpi import algorithms
from fedlora_mpi.models.zoo import build

ROOT = TESTS.parent
MAKE = runpy.run_path(str(ROOT / "docs/make_methods.py"))
PAGE = MAKE["PAGE"].read_text(encoding="utf-8")
WAY_OUT = "run `python docs/make_methods.py` and look at the change"
EXAMPLE = PAGE[PAGE.index("## Add a method") :]


def blocks(language: str) -> list[str]:
    """The blocks of one language in the section that adds a method."""
    return re.findall(rf"```{language}\n(.*?)```", EXAMPLE, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder of a user: the page's example beside the configs."""
    (tmp_path / "my_methods.py").write_text(blocks("python")[0])
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_methods", None)


def test_every_method_has_a_heading_and_its_place():
    named = [name for _, name in MAKE["HEADING"].findall(PAGE)]
    assert sorted(named) == algorithms.names() == sorted(MAKE["SAID"]), (
        "docs/methods.md needs a heading `### TITLE` with `<!-- facts of NAME -->` and `<!-- end -->` under it, and "
        "docs/make_methods.py a line in SAID, for every file of fedlora_mpi/algorithms"
    )


def test_the_page_is_that_of_the_code():
    old, new = PAGE.splitlines(), MAKE["made"](PAGE).splitlines()
    changed = [f"{a}\n  is now\n{b}" for a, b in zip(old, new) if a != b] or ["lines were added or left out"]
    assert old == new, f"docs/methods.md is stale: {WAY_OUT}. The first change:\n{changed[0]}"


@pytest.mark.parametrize("network", [MAKE["REFERENCE"], ("cifar_resnet8", {}, 7, (1, 20, 24), 1)], ids=lambda n: n[0])
def test_the_formulas_give_what_is_measured(network):
    model = build(*network)
    for name, said in MAKE["SAID"].items():
        assert MAKE["computed"](said.bytes, model) == MAKE["measured"](algorithms.find(name)(), model), name


@pytest.mark.parametrize("name", ["fedavg", "fedamp", "fedcac", "fedpac"])
def test_what_is_measured_is_what_a_round_logs(name):
    parts, row = built(f"algorithm={name}"), played(f"algorithm={name}", "rounds=1")[0][-1].row
    counted = MAKE["measured"](parts.config.algorithm, parts.run.trainer.model)
    assert (row["bytes_up"], row["bytes_down"]) == (counted.up * row["clients"], counted.down * row["clients"])


@pytest.mark.parametrize("name", algorithms.names())
def test_a_paper_is_found_where_the_docstring_cites_one(name):
    text = MAKE["text_of"](name)
    assert (text.paper == "–") == (name == "local")
    assert text.paper.count("https://") == text.short.count("https://")
    assert text.body and text.batchnorm and text.deviations


def test_the_number_of_methods_is_that_of_the_folder():
    assert f"the {len(algorithms.names())} methods" in PAGE


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!https://|#)([^)]+)\)", PAGE):
        assert (ROOT / "docs" / target).resolve().exists(), target


def test_the_commands_of_the_example_run(folder):
    lines = [shlex.split(line) for line in blocks("bash")[0].splitlines()]
    assert [line[:2] for line in lines] == [["fedlora-mpi", "plan"], ["fedlora-mpi", "run"]]
    for line in lines:
        ended = finished(command(*line[1:], "rounds=1"), folder)
        assert ended.returncode == 0, ended.stderr
    assert (folder / "runs/quickstart-HeldPer/log.h5").exists()


def test_the_message_of_the_example_is_that_of_the_command(folder):
    line = "run", "configs/quickstart.yaml", "algorithm=my_methods:HeldPer", "algorithm.mu=-1.0"
    ended = finished(command(*line), folder)
    assert (ended.returncode, ended.stderr) == (2, blocks("text")[0])


def test_the_example_without_its_term_is_fedper(folder):
    own, other = (played(f"algorithm={name}", "rounds=2")[0] for name in ("my_methods:HeldPer", "fedper"))
    plain = played("algorithm=my_methods:HeldPer", "algorithm.mu=0", "rounds=2")[0]
    for mine, fedper in zip(plain, other, strict=True):
        assert equal(mine.shared, fedper.shared) and equal(mine.personal, fedper.personal)
    assert not equal(own[-1].shared, other[-1].shared)
