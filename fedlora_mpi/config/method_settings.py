"""The settings of a method: meaning, unit, range, default, and where the default comes from.

A comment after a field or above it says so, in this form:

    # [epochs] of ``train.epochs`` that train the head; default: the authors' code
    head_epochs: int = 4

Numbers have a unit, [1] for a plain number. Ranges follow from the field's type and ``bounded``.
A class that gives an inherited field another default only says where that comes from.
"""

import ast
import inspect
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from io import StringIO
from typing import Any, NamedTuple, cast

from ..algorithm import Algorithm
from ..core.bounds import describe_range
from .blocks import allowed_texts, join_alternatives

_COMMENT = re.compile(r"(?:\[([^]]+)\] )?(?:(.+); )?default: (.+)")


class Setting(NamedTuple):
    """A field of a method. A text is empty where no comment says it."""

    name: str
    default: Any
    allowed: str
    unit: str
    meaning: str
    source: str  # of the default

    def explanation_lines(self) -> list[str]:
        """All of this in words, in lines of up to 96 characters."""
        unit = f" [{self.unit}]" if self.unit else ""
        default = self.default if isinstance(self.default, str) else json.dumps(self.default)
        text = f"{self.meaning}. Allowed: {self.allowed}{unit}. Default: {default} ({self.source})"
        return textwrap.wrap(text.replace("``", ""), 96)


def method_settings(cls: type[Algorithm]) -> list[Setting]:
    """All settings of a method, in the order of its fields."""
    return list(_settings(cls)) if is_dataclass(cls) else []


def _settings(cls: type[Algorithm]) -> Iterator[Setting]:
    allowed = allowed_values(cls)
    for field in fields(cast(Any, cls)):
        unit = meaning = source = ""
        for owner in cls.__mro__:
            if match := _COMMENT.fullmatch(_comments(owner).get(field.name, "")):
                unit, meaning = unit or match[1] or "", meaning or match[2] or ""
                if vars(owner).get(field.name) == field.default:
                    source = source or match[3]
        yield Setting(field.name, field.default, allowed[field.name], unit, meaning, source)


def allowed_values(cls: type) -> dict[str, str]:
    """{field: the values in words that it takes} of a dataclass."""
    intervals, allowed = _intervals(cls), {}
    for field in fields(cls):
        interval = intervals.get(field.name)
        texts = [describe_range(field.type, interval)] if interval else allowed_texts(field.type)
        allowed[field.name] = join_alternatives(texts)
    return allowed


@cache
def _comments(owner: type) -> dict[str, str]:
    """{field: the comment above it, else after it} of the annotations in the class itself."""
    if not inspect.get_annotations(owner) or owner.__module__ == "builtins":
        return {}
    source = textwrap.dedent(inspect.getsource(owner))
    lines = dict(enumerate(source.splitlines(), 1))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith("# type:")
    }
    found = {}
    for node in cast(ast.ClassDef, ast.parse(source).body[0]).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while lines[first - 1].lstrip().startswith("#"):
                first -= 1
            texts = [comments.get(n, "") for n in range(first, node.lineno)]
            found[node.target.id] = " ".join(texts) or comments.get(node.end_lineno or 0, "")
    return found


def _intervals(cls: type) -> dict[str, str]:
    """{field: interval} of the calls of ``bounded`` in the constructors of a class."""
    intervals: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if "__post_init__" in vars(owner):
            source = textwrap.dedent(inspect.getsource(vars(owner)["__post_init__"]))
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "bounded":
                    intervals |= {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
    return intervals
