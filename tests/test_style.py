"""How the package reads, as far as a program can tell (CONTRIBUTING.md has the rest)."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
from runs import TESTS

FILES = sorted((TESTS.parent / "fedlora_mpi").rglob("*.py"))
PARTICIPLE = re.compile(
    r"_?([a-z]+(ed|ing)|told|made|sent|shown|given|kept|held|drawn|chosen|met|due|found|here)"
)
DOCUMENTED = {"bounded", "decomposed", "used"}
NOUNS = {"_enclosing", "elapsed", "padding", "shared", "stacked", "waiting"}  # or say of a value


def test_no_function_is_named_by_a_bare_participle_or_particle():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and PARTICIPLE.fullmatch(node.name):
                assert node.name in DOCUMENTED | NOUNS, (
                    f"{file.relative_to(TESTS.parent)}:{node.lineno}"
                )


def test_lint_sorts_imports_alike_once_make_run_has_made_a_folder(tmp_path):
    """tests/runs.py has the name of that folder."""
    pytest.importorskip("ruff")
    (tmp_path / "runs").mkdir()
    for name in ("pyproject.toml", "tests/test_style.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(TESTS.parent / name, tmp_path / name)
    ruff = [sys.executable, "-m", "ruff", "check", "--select=I", "--no-cache", "tests"]
    result = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
