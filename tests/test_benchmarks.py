"""The benchmarks: each is told of, answers ``--help`` and reports by the one helper,
which works."""

import json
import os
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
from runs import TESTS

HOME = TESTS.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in HOME.glob("*.py") if path.stem != "report")
README = (HOME / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(HOME)
    import report

    return report


def test_every_script_has_its_section_and_every_section_its_script():
    assert sorted(re.findall(r"^## (\w+)\.py$", README, re.MULTILINE)) == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_section_has_a_question_and_the_command(name):
    section = re.split(r"^## ", README, flags=re.MULTILINE)
    own = next(part for part in section if part.startswith(f"{name}.py\n"))
    assert (
        re.search(r"\*\*[^*]+\?\*\*", own)
        and "First:" in own
        or name in ("two_processes", "memory")
    ), own
    assert f"python benchmarks/{name}.py" in own


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_answers_help_with_its_question(name, report, monkeypatch, capsys):
    path = HOME / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    text, source = capsys.readouterr().out, path.read_text(encoding="utf-8")
    assert (
        end.value.code == 0
        and "--json FILE" in text
        and source.split('"""')[1].splitlines()[0] in text
    )
    assert re.search(r"\btell\(asked, ", source)


def test_a_report_has_a_column_for_every_key(report):
    rows = [{"a": 1234567, "b": 0.123456}, {"a": "x|y", "c": 12345.6}]
    assert report.table(rows).splitlines() == [
        "| a | b | c |",
        "| --- | --- | --- |",
        "| 1,234,567 | 0.1235 |  |",
        "| x\\|y |  | 12,346 |",
    ]


def test_a_report_says_what_it_was_measured_on(report, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some.py", "--root", "a b"])
    file = tmp_path / "found.json"
    report.tell(SimpleNamespace(json=file), [{"ratio": 1.5}], ["pytest"])
    out, found = capsys.readouterr().out, json.loads(file.read_text())
    assert found["rows"] == [{"ratio": 1.5}] and found["command"] == "python some.py --root 'a b'"
    assert {"torch", "Python", "pytest"} <= found["versions"].keys() and found[
        "cores"
    ] == os.cpu_count()
    for told in (
        "| ratio |",
        "| 1.5 |",
        found["commit"],
        found["date"],
        found["processor"],
        found["versions"]["torch"],
    ):
        assert told in out


def test_a_report_without_a_file_writes_none(report, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report.tell(report.arguments("What?").parse_args([]), [{"ratio": 1.5}])
    assert "ratio" in capsys.readouterr().out and not list(tmp_path.iterdir())
