"""One file per algorithm; the file's name is the name used in a config."""

from importlib import import_module
from pathlib import Path

from ..algorithm import Algorithm
from ..core.user_code import imported


def names() -> list[str]:
    """All algorithms of this folder, in alphabetical order."""
    return sorted(f.stem for f in Path(__file__).parent.glob("*.py") if not f.stem.startswith("_"))


def find(name: str) -> type[Algorithm]:
    """The class of ``algorithms/<name>.py``, or of ``your.module:Class``.

    Raises ValueError when there is none.
    """
    if ":" in name:
        try:
            found = imported(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"name = {name}: cannot be imported: {error}") from error
        if not (isinstance(found, type) and issubclass(found, Algorithm)):
            raise ValueError(f"name = {name}: is not a subclass of fedlora_mpi.algorithm.Algorithm")
        return found
    if name not in names():
        raise ValueError(
            f"name = {name}: there is no such algorithm; there are {', '.join(names())}"
        )
    module = import_module(f".{name}", __name__)
    own = [c for c in vars(module).values() if getattr(c, "__module__", "") == module.__name__]
    (algorithm,) = [c for c in own if isinstance(c, type) and issubclass(c, Algorithm)]
    return algorithm
