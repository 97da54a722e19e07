"""Names that others chose act on nothing: no terminal, no TeX, no spreadsheet, no page, no file
outside the report.
"""

import csv
import json
import os
import re
import shutil
import unicodedata
from pathlib import Path

import h5py
import pytest
from folders import reseal
from runs import TESTS

from fedlora_mpi.cli import main
from fedlora_mpi.core import escapes
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import collectively, run_or_abort

CONFIG = str(TESTS / "faulty.yaml")
HOSTILE = "=1+1\x1b]0;owned\x07\n\u202e\x9b2J<script>^~\\{}_%$#&|/../../\u2028é"


def acts(text: str) -> list[str]:
    """The characters that a terminal obeys, less the ends of lines."""
    return [
        c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs whose configs have something hostile in the place of every text, and as the name of
    a setting.
    """
    home = tmp_path_factory.mktemp("hostile")
    assert main(["run", CONFIG, f"output={home / 'good'}"]) == 0
    for number in (1, 2):
        folder = shutil.copytree(home / "good", home / f"run{number}")
        with h5py.File(folder / "log.h5", "r+") as file:
            config = json.loads(file.attrs["config_json"], object_pairs_hook=lambda pairs, number=number: {
                key: f"{HOSTILE}{number}" if isinstance(value, str) else value for key, value in pairs
            })  # fmt: skip
            config["algorithm"] |= {f"../../{HOSTILE}": number, "$\\frac$": f"$\\frac{number}$"}
            file.attrs["config_json"] = json.dumps(config)
        reseal(folder / "log.h5")
    return [home / "run1", home / "run2"]


@pytest.mark.parametrize("command", ["report", "watch", "digest"])
def test_a_name_does_nothing_to_a_terminal(runs, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "run\x1b[2J\u202e\x9b\n"
    shutil.copytree(runs[0], name)
    assert main({"watch": ["watch", name, "--once"]}.get(command, [command, name])) == 0
    out, err = capsys.readouterr()
    assert r"run\x1b[2J\u202e\x9b\n" in out and not acts(out + err) and "\n\n" not in out.strip()
    (Path(name) / "log.h5").unlink()
    assert main({"watch": ["watch", name, "--once"]}.get(command, [command, name])) == 2
    err = capsys.readouterr().err
    assert not acts(err) and err.count("\n") == 1


def test_an_error_is_one_line_that_only_shows(capsys):
    def refuse():
        raise ValueError(HOSTILE)

    assert run_or_abort(Solo(), lambda: collectively(Solo(), refuse)) == 2
    err = capsys.readouterr().err
    assert not acts(err) and err.count("\n") == 1 and r"=1+1\x1b]0;owned\x07\n\u202e" in err


def test_a_name_does_nothing_in_any_file_of_a_report(runs, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    assert main(["report", *map(str, runs), "-o", "page"]) == 0
    assert not acts("".join(capsys.readouterr()))
    assert os.listdir(tmp_path) == ["in"] and os.listdir(".") == ["page"]
    assert {path.name for path in Path("page").iterdir()} == {"report.html", "figures", "tables"}
    page = Path("page/report.html").read_text()
    assert (
        "<script" not in page
        and not acts(page)
        and not re.search(r'(id|href)="[^"]*[^\w.#"-][^"]*"', page)
    )
    for path in Path("page/tables").iterdir():
        text = path.read_text()
        if path.suffix == ".csv":
            cells = [cell for row in csv.reader(text.splitlines(keepends=True)) for cell in row]
            assert not [
                c for c in cells if c[:1] in "=+-@\t\r" and c and escapes.csv_cell(c) != c
            ], path
        else:
            assert not acts(text), path
        if path.suffix == ".tex":
            body = re.sub(
                r"\\[a-z]+|\\[%_&#${}]|\$\\pm\$",
                "",
                "".join(line for line in text.splitlines() if line[0] != "%"),
            )
            assert not set("^~#_%$") & set(body), path
    assert any("owned" in path.read_text() for path in Path("page/tables").glob("*.tex"))


def test_each_way_out_has_its_own_escapes():
    assert escapes.escape_line("a plain é — text") == "a plain é — text"
    assert escapes.escape_line("\ud800\x00\x7f\t\r\n\u2066") == r"\ud800\x00\x7f\t\r\n\u2066"
    assert escapes.escape_lines("a\nb\x1b") == "a\nb\\x1b"
    assert escapes.escape_tex("\\^~{}%_&#$\n± →") == (
        r"\textbackslash{}\textasciicircum{}\textasciitilde{}\{\}\%\_\&\#\$\textbackslash{}n$\pm$ $\to$"
    )
    for text in ("=1", "+x", "-x", "@x", "\tx", "\rx", "-", "-1+1"):
        assert escapes.csv_cell(text) == f"'{text}"
    for value in ("-0.5", "+1e-3", "x=1", "", -0.5, None, 3):
        assert escapes.csv_cell(value) == value
    assert escapes.safe_file_name(
        "../../etc/passwd\n"
    ) == "-.--.-etc-passwd-n" and "/" not in escapes.safe_file_name(HOSTILE)
