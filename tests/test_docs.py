"""``docs/methods.md`` and ``docs/add_a_method.md`` say what the code does: tables, formulas and the
example.
"""

import re
import runpy
import sys

import pytest
from runs import TESTS, build_tiny, run_rounds, trees_equal

from fedlora_mpi import algorithms
from fedlora_mpi.analysis.method_names import paper_name
from fedlora_mpi.models.zoo import build

ROOT = TESTS.parent
MAKE = runpy.run_path(str(ROOT / "docs/make_methods.py"))
PAGE, GUIDE = (MAKE[name].read_text(encoding="utf-8") for name in ("PAGE", "GUIDE"))
WAY_OUT = "run `python docs/make_methods.py` and look at the change"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder of a user, with the guide's example."""
    (tmp_path / "held_per.py").write_text(re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("held_per", None)


def test_every_method_has_a_heading_and_its_place():
    named = [name for _, name in MAKE["HEADING"].findall(PAGE)]
    assert sorted(named) == algorithms.algorithm_names() == sorted(MAKE["SAID"]), (
        "docs/methods.md needs a heading `### TITLE` with `<!-- facts of NAME -->` and `<!-- end "
        "-->` under it, and docs/make_methods.py a line in SAID, for every file of "
        "fedlora_mpi/algorithms"
    )


def test_a_heading_is_the_name_that_a_report_shows():
    headings = {name: title for title, name in MAKE["HEADING"].findall(PAGE)}
    assert {name: paper_name(name) for name in headings} == headings


@pytest.fixture(params=["computed", pytest.param("measured", marks=pytest.mark.thorough)])
def numbers(request, monkeypatch):
    """What the page's numbers come from: by the formulas, which the next test compares with what is
    measured, or measured.
    """
    letters = MAKE["symbols"](build(*MAKE["REFERENCE"]))

    def of(algorithm):
        return MAKE["SAID"][type(algorithm).__module__.rpartition(".")[2]].bytes

    if request.param == "computed":

        def stand_in(algorithm, model):
            return MAKE["computed"](of(algorithm), letters)

        monkeypatch.setitem(MAKE["made"].__globals__, "measured", stand_in)


@pytest.mark.parametrize("name", ["PAGE", "GUIDE"])
def test_the_page_is_that_of_the_code(name, numbers):
    page = MAKE[name].read_text(encoding="utf-8")
    old, new = page.splitlines(), MAKE["made"](page).splitlines()
    changed = [f"{a}\n  is now\n{b}" for a, b in zip(old, new, strict=False) if a != b] or [
        "lines were added or left out"
    ]
    assert old == new, f"{MAKE[name].name} is stale: {WAY_OUT}. The first change:\n{changed[0]}"


SMALL, LARGE = (
    ("small:bn_net", {}, 7, (1, 20, 24), 1),
    (MAKE["REFERENCE"], ("cifar_resnet8", {}, 7, (1, 20, 24), 1)),
)


@pytest.mark.parametrize(
    "network",
    [SMALL, *(pytest.param(network, marks=pytest.mark.thorough) for network in LARGE)],
    ids=lambda n: n[0],
)
def test_the_formulas_give_what_is_measured(network):
    letters = MAKE["symbols"](model := build(*network))
    for name, said in MAKE["SAID"].items():
        counted = MAKE["measured"](MAKE["reference_method"](name), model)
        assert MAKE["computed"](said.bytes, letters) == counted, name


@pytest.mark.parametrize("name", ["fedavg", "fedamp", "fedcac", "fedpac"])
def test_what_is_measured_is_what_a_round_logs(name):
    parts, row = (
        build_tiny(f"algorithm={name}"),
        run_rounds(f"algorithm={name}", "rounds=1")[0][-1].row,
    )
    counted = MAKE["measured"](parts.config.algorithm, parts.federation.clients.trainer.model)
    assert (row["bytes_up"], row["bytes_down"]) == (
        counted.up * row["clients"],
        counted.down * row["clients"],
    )


@pytest.mark.parametrize("name", algorithms.algorithm_names())
def test_a_paper_is_found_where_the_docstring_cites_one(name):
    text = MAKE["text_of"](name)
    assert (text.paper == "–") == (name == "local")
    assert text.paper.count("https://") == text.short.count("https://")
    assert text.body and text.batchnorm and text.deviations


def test_the_number_of_methods_is_that_of_the_folder():
    assert f"the {len(algorithms.algorithm_names())} methods" in PAGE


def test_the_example_without_its_term_is_fedper(folder):
    own, other = (
        run_rounds(f"algorithm={name}", "rounds=2")[0] for name in ("held_per:HeldPer", "fedper")
    )
    plain = run_rounds("algorithm=held_per:HeldPer", "algorithm.mu=0", "rounds=2")[0]
    for mine, fedper in zip(plain, other, strict=True):
        assert trees_equal(mine.shared, fedper.shared) and trees_equal(
            mine.personal, fedper.personal
        )
    assert not trees_equal(own[-1].shared, other[-1].shared)
