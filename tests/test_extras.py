"""Libraries that are missing or badly installed: one line."""

import ast
import sys
from pathlib import Path

import pytest

import fedlora_mpi
from fedlora_mpi.core.extras import extra_imports

PACKAGE = Path(fedlora_mpi.__file__).parent


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with (
        pytest.raises(ValueError) as error,
        extra_imports("sklearn", "digits", "metrics = f1", "leave it out"),
    ):
        import sklearn  # noqa: F401
    assert str(error.value) == (
        "metrics = f1: scikit-learn is not installed; pip install 'fedlora-mpi[digits]', or leave "
        "it out"
    )


@pytest.mark.parametrize(
    "fault, said",
    [
        ("raise RuntimeError('no CUDA\\nhere')", "no CUDA here"),
        ("raise OSError('libx.so: cannot open')", "libx.so: cannot open"),
        ("from collections import no_such", "ImportError: cannot import name 'no_such'"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_library_that_fails_is_not_called_missing(fault, said, tmp_path, monkeypatch):
    (tmp_path / "badly_installed.py").write_text(fault)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error, extra_imports("badly_installed", "some"):
        import badly_installed  # noqa: F401
    assert str(error.value).startswith(f"badly_installed cannot be imported ({said}")
    assert str(error.value).endswith("; pip install 'fedlora-mpi[some]'")
    assert "\n" not in str(error.value)


def test_no_other_place_tells_of_a_missing_library():
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ExceptHandler) and node.type is not None:
                caught = ast.unparse(node.type)
                tells = any(isinstance(n, ast.Raise) and n.exc for n in ast.walk(node))
                if tells and caught in ("ImportError", "ModuleNotFoundError"):
                    found.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert found == []
