"""The lists of ``make mutants`` fit the package: each change can still be made, and no method or
folder is left out.
"""

import runpy
from pathlib import Path

import pytest
from runs import TESTS

from fedlora_mpi import algorithms

ROOT = TESTS.parent
MUTANTS = runpy.run_path(str(TESTS / "mutants/run.py"))["read_mutants"]()


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mutant_changes_one_place_and_is_still_python(mutant):
    text = (ROOT / mutant.file).read_text()
    changed = mutant.apply_to(text)
    assert changed != text
    if mutant.file.endswith(".py"):
        compile(changed, mutant.file, "exec")


def test_every_mutant_has_a_name_and_tests_that_there_are():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 60
    for mutant in MUTANTS:
        assert mutant.tests, mutant.name
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), (
                f"{mutant.name}: {test}"
            )


def test_every_method_and_every_folder_has_a_mutant():
    files = {mutant.file for mutant in MUTANTS}
    assert {f"fedlora_mpi/algorithms/{name}.py" for name in algorithms.algorithm_names()} <= files
    code = {
        file.relative_to(ROOT)
        for file in (ROOT / "fedlora_mpi").rglob("*.py")
        if file.name != "__init__.py"
    }
    assert {file.parent for file in code} <= {Path(file).parent for file in files}
