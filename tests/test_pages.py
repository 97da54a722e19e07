"""Every command and every piece of Python in ``docs/*.md`` and README.md runs, and prints what
stands under it.

A page is run in a copy of the repository, its blocks in order: ```bash, ```python (one namespace a
page), ```yaml that is a whole file or a part of a config. A block of Python or YAML whose first
line is a comment with a file's name is written to that file. A block ```text right after one that
ran is its output: equal up to white space, decimals, and "..." for anything. Other languages are
not run (``docs/index.md`` tells readers which and why).
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
from runs import TESTS, process_environment

from fedlora_mpi import config as configs

ROOT = TESTS.parent
PAGES = sorted(ROOT.glob("docs/*.md")) + [ROOT / "README.md"]
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"# (\S+\.(?:py|yaml))\n")
LANGUAGES = ("bash", "python", "yaml", "text", "console", "{toctree}", "{eval-rst}")
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "runs", ".*_cache", ".hypothesis", "*.egg-info"
)


class Block(NamedTuple):
    """A fenced block; ``output``: what it must print, None where the page does not say."""

    line: int  # of the page, from 1
    language: str
    text: str
    output: str | None


def blocks(page: str) -> list[Block]:
    """All blocks of a page but outputs."""
    found = list(BLOCK.finditer(page))
    shows = [
        after[1] == "text" and not page[block.end() : after.start()].strip()
        for block, after in itertools.pairwise(found)
    ]
    outputs = [
        after[2] if shown else None for after, shown in zip(found[1:], shows, strict=True)
    ] + [None]
    alone = [True, *(not shown for shown in shows)]
    return [
        Block(page[: block.start()].count("\n") + 1, block[1], block[2], output)
        for block, output, apart in zip(found, outputs, alone, strict=False)
        if apart
    ]


def printed(expected: str, found: str) -> bool:
    """Whether ``found`` is what a page shows, see above.

    >>> printed("a 1.5 %\\n...\\nend", "a 2.25 %\\nb\\nc\\nend\\n"), printed("12 clients", "13 clients")
    (True, False)
    """
    decimal = re.compile(r"-?\d+\.\d+(e-?\d+)?")
    expected, found = (" ".join(decimal.sub("0.0", text).split()) for text in (expected, found))
    pattern = r"\s*".join(
        ".*?" if part == "..." else re.escape(part)
        for part in re.split(r"\s*(\.\.\.)\s*", expected)
    )
    return re.fullmatch(pattern, found, re.DOTALL) is not None


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A copy of the repository as the current folder, whose package the commands run."""
    folder = tmp_path / "fedlora_mpi"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    known = set(sys.modules)
    yield folder
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(folder):
            del sys.modules[name]


def bash(text: str, folder: Path) -> str:
    """What the commands print, both streams; the test fails when one of them does."""
    env = process_environment(
        PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    )
    env |= {"PYTHONPATH": os.pathsep.join([str(folder), str(folder / "tests")]), "COLUMNS": "120"}
    env |= {
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
    }
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1800,  # a loaded machine is no failure
    )
    assert ended.returncode == 0, f"exit code {ended.returncode}\n{text}\n{ended.stdout}"
    return ended.stdout


def run(block: Block, folder: Path, names: dict) -> str:
    """What the block prints."""
    if block.language == "bash":
        return bash(block.text, folder)
    with redirect_stdout(StringIO()) as out:
        exec(compile(block.text, "the page", "exec"), names)
    return out.getvalue()


def play(name: str, page: str, folder: Path) -> None:
    """Run a page in a clone; the test fails where it does not do or print what it says."""
    names: dict = {}
    for block in blocks(page):
        where = f"{name}:{block.line}"
        assert block.language in LANGUAGES, (
            f"{where}: a block of {block.language or 'no language'}; see {Path(__file__).name}"
        )
        named = NAMED.match(block.text)
        if named and block.language in ("python", "yaml"):
            Path(named[1]).write_text(block.text, encoding="utf-8")
        elif block.language == "yaml":
            Path("part.yaml").write_text(
                f"base: configs/quickstart.yaml\n{block.text}", encoding="utf-8"
            )
            configs.read("part.yaml")
        elif block.language in ("bash", "python"):
            found = run(block, folder, names)
            if block.output is not None:
                assert printed(block.output, found), (
                    f"{where} prints\n{found}\nand the page says\n{block.output}"
                )
        elif block.language == "console":
            assert all(line.startswith("$ ") for line in block.text.splitlines()), (
                f"{where}: lines begin with $"
            )


def trains(page: Path) -> bool:
    """Whether a page runs anything, which takes seconds."""
    return any(
        block.language in ("bash", "python") for block in blocks(page.read_text(encoding="utf-8"))
    )


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.thorough if trains(page) else (), id=page.stem)
        for page in PAGES
    ],
)
def test_what_a_page_shows_runs_and_prints_what_it_says(page, clone):
    play(page.name, page.read_text(encoding="utf-8"), clone)


MADE_UP = """\
```python
# part.py
answer = 41
```

```yaml
train: {{lr: {lr}}}
```

```bash
echo "accuracy 1.25 %"; python -c 'import fedlora_mpi; print("{folder}/" in fedlora_mpi.__file__)'
```

```text
accuracy 2.5 %
True
```

```python
import part
for n in range(9): print(part.answer + n)
```

```text
41
...
{last}
```

```console
{prompt} reboot
```
"""
RIGHT = {"lr": 0.1, "folder": "fedlora_mpi", "last": 49, "prompt": "$"}


def test_a_page_that_is_right_passes(clone):
    play("made-up.md", MADE_UP.format(**RIGHT), clone)


@pytest.mark.parametrize(
    "wrong, why",
    [
        ({"lr": -1}, r"train.lr = -1.0: must be"),
        (
            {"folder": "elsewhere"},
            r"made-up.md:10 prints\s+accuracy 1.25 %\s+False\s+and the page says",
        ),
        ({"last": 48}, r"made-up.md:19 prints"),
        ({"prompt": ">"}, r"made-up.md:30: lines begin with \$"),
        ({"last": "```\n\n```sh\nls"}, r"made-up.md:\d+: a block of sh; see test_pages.py"),
        ({"last": "...\n```\n\n```bash\nfalse"}, r"exit code 1\s+false"),
    ],
    ids=list("abcdef"),
)
def test_a_page_that_is_wrong_fails(wrong, why, clone):
    with pytest.raises((AssertionError, ValueError), match=why):
        play("made-up.md", MADE_UP.format(**RIGHT | wrong), clone)


def test_readme_s_links_lead_to_files_and_headings():
    readme = ROOT / "README.md"
    for target in re.findall(r"\]\((?!https://)([^)]+)\)", readme.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        file = ROOT / file if file else readme
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [
                re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings
            ], target
