"""Write the names of methods as their papers write them."""

import ast
import re
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "algorithms"


@cache
def paper_name(name: str) -> str:
    """Return the name of a method as its paper writes it, such as ``FedAvg+FT`` for ``fedavg_ft``.

    It is the first word with the letters of ``name`` in the docstring of ``algorithms/<name>.py``,
    or else the name of the class there. The file is read, not imported, so torch is not needed. The
    name of a user's method ``module:Class`` is that of its class.
    """
    if ":" in name or not (_FOLDER / f"{Path(name).name}.py").is_file():
        return name.rpartition(":")[2]
    module = ast.parse((_FOLDER / f"{Path(name).name}.py").read_text(encoding="utf-8"))
    classes = [node.name for node in module.body if isinstance(node, ast.ClassDef)]
    text = "\n".join([ast.get_docstring(module) or "", *classes])
    # signs may be between the letters; a file name or a part of an address is none of its words
    letters = r"[ +-]*".join(name.replace("_", ""))
    words = re.findall(rf"(?<![\w/`]){letters}(?!\w|\.py)", text, re.IGNORECASE)
    return next((word for word in words if not word.islower()), name)
