"""Sphinx's settings: ``make docs`` makes ``build/docs/index.html`` of the Markdown and the notebook
in this folder.

The notebook lies here without outputs and is run whenever the site is built: what a page shows of
it was just computed. Nothing of the site comes from the network.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent

project = "fedlora_mpi"
html_title = "fedlora_mpi"
html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sourcelink = html_copy_source = False
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc"]
sys.path.insert(0, str(HERE.parent))  # of the reference, whose text is that of the docstrings
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types in signatures that have no page here
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
nitpicky = True
myst_heading_anchors = 4  # of all headings down to ####, made as GitHub makes them


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("source-read", read_notebook)
    app.connect("autodoc-process-docstring", escape_docstring)
    app.connect("autodoc-skip-member", skip_tuple_field)


def escape_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Turn a docstring, which is plain text with ``code``, into reStructuredText."""
    lines[:] = "\n\n".join(map(_paragraph, "\n".join(lines).split("\n\n"))).split("\n")


def _paragraph(text: str) -> str:
    """A paragraph with its marks escaped; one whose lines hang is a list, an example stays."""
    if text.startswith(">>>"):
        return text
    parts = re.split(r"(``.*?``)", text, flags=re.DOTALL)
    parts[::2] = [re.sub(r"([*|_`\\])", r"\\\1", part) for part in parts[::2]]
    text = "".join(parts)
    return re.sub(r"^(?=\S)", "*   ", text, flags=re.MULTILINE) if "\n    " in text else text


def skip_tuple_field(app, what, name, obj, skip, options) -> bool | None:
    """Leave out the fields of named tuples, which have no docstring of their own."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def read_notebook(app, name: str, source: list[str]) -> None:
    """Put the Markdown of an executed notebook in the place of its JSON."""
    if app.env.doc2path(name).suffix == ".ipynb":
        source[0] = "\n\n".join(shown(cell) for cell in executed(source[0]).cells)


def executed(text: str) -> nbformat.NotebookNode:
    """The notebook ``text`` with the outputs of its cells, run in a scratch copy of ``configs``.
    Raises CellExecutionError.
    """
    notebook = nbformat.reads(text, as_version=4)
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(HERE.parent / "configs", Path(scratch) / "configs")
        # `!fedlora-mpi` is that of this Python
        here = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        above = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": scratch}})
        return client.execute(env=os.environ | {"PATH": here, "PYTHONPATH": above})


def shown(cell: nbformat.NotebookNode) -> str:
    """A cell as Markdown."""
    if cell.cell_type == "markdown":
        return cell.source
    return "\n\n".join([_block("ipython3", cell.source), *map(_output, cell.outputs)])


def _output(output: nbformat.NotebookNode) -> str:
    if output.output_type == "stream":
        return _block("text", output.text)
    if "image/png" in output.data:
        return _block(
            "{raw} html",
            f'<img alt="figure" src="data:image/png;base64,{output.data["image/png"].strip()}">',
        )
    if "text/html" in output.data:
        return _block("{raw} html", f'<div class="table-wrapper">{output.data["text/html"]}</div>')
    return _block("text", output.data["text/plain"])


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
