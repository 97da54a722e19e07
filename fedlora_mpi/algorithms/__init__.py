"""One file per algorithm; the file name is the name used in a config."""

from importlib import import_module
from pathlib import Path

from ..algorithm import Algorithm
from ..core.user_code import import_object


def algorithm_names() -> list[str]:
    """The names of all algorithms in this folder, in alphabetical order."""
    return sorted(f.stem for f in Path(__file__).parent.glob("*.py") if not f.stem.startswith("_"))


def find_algorithm(name: str) -> type[Algorithm]:
    """The class in ``algorithms/<name>.py``, or the class ``your.module:Class``.

    Raises ValueError when there is no such algorithm.
    """
    if ":" in name:
        try:
            algorithm_class = import_object(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"name = {name}: cannot be imported: {error}") from error
        if not (isinstance(algorithm_class, type) and issubclass(algorithm_class, Algorithm)):
            raise ValueError(f"name = {name}: is not a subclass of fedlora_mpi.algorithm.Algorithm")
        return algorithm_class
    if name not in algorithm_names():
        raise ValueError(
            f"name = {name}: there is no such algorithm; there are {', '.join(algorithm_names())}"
        )
    module = import_module(f".{name}", __name__)
    local_objects = [
        c for c in vars(module).values() if getattr(c, "__module__", "") == module.__name__
    ]
    (algorithm,) = [c for c in local_objects if isinstance(c, type) and issubclass(c, Algorithm)]
    return algorithm
