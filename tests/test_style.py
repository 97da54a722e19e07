"""How the package reads, as far as a program can tell (CONTRIBUTING.md has the rest)."""

import ast
import re

from runs import TESTS

FILES = sorted((TESTS.parent / "fedlora_mpi").rglob("*.py"))
PARTICIPLE = re.compile(
    r"_?([a-z]+(ed|ing)|told|made|sent|shown|given|kept|held|drawn|chosen|met|due|found|here)"
)
# `bounded`, `decomposed` and `used` are documented names; the others are nouns or adjectives of a value
KEPT = {"bounded", "decomposed", "used", "_enclosing", "elapsed", "padding", "shared", "stacked"}
KEPT |= {"waiting"}


def test_no_function_is_named_by_a_bare_participle_or_particle():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and PARTICIPLE.fullmatch(node.name):
                assert node.name in KEPT, f"{file.relative_to(TESTS.parent)}:{node.lineno}"
