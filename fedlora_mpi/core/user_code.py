"""Imports the user's modules that a config names; no other file does."""

import ast
import sys
from contextlib import suppress
from hashlib import blake2b
from importlib import import_module, reload
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

from . import bounds, tree, vision
from .seeds import isolate_rng

# Former names of modules that users' files may still import.
FORMER_MODULES = {"fedlora_mpi.bounds": bounds, "fedlora_mpi.tree": tree}
_PACKAGE = Path(__file__).parents[1]
_LOADED = "__fedlora_mpi_loaded__"  # a module's attribute: the checksum of the source it has


def import_object(name: str) -> Any:
    """The object that ``your.module:Name`` names, as its file is now.

    A module whose file, or that of a module beside it that it uses, has changed is loaded again.
    The module may import torchvision, also with a CPU-only torch. Its draws from global generators
    during the import are the same in every process and affect no other draw. Raises ImportError and
    AttributeError as Python does. Raises ValueError for any other error of the module, or if a
    library hides the user's file.
    """
    module_name, _, attribute = name.partition(":")
    vision.repair_torchvision()
    for former, module in FORMER_MODULES.items():
        sys.modules[former] = module
        setattr(sys.modules["fedlora_mpi"], former.rpartition(".")[2], module)
    try:
        with isolate_rng(0, "import", module_name):
            module = import_module(module_name)
            _reload_if_changed(module, _import_folder(module), set())
    except ImportError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(describe_error(error)) from error
    local_file = Path(module_name.partition(".")[0] + ".py")
    if (
        not hasattr(module, attribute)
        and local_file.is_file()
        and local_file.resolve() != Path(getattr(module, "__file__", "")).resolve()
    ):
        raise ValueError(
            f"{local_file.stem} is a module of Python or of a library, which comes before "
            f"{local_file.resolve()}; rename that"
        )
    return getattr(module, attribute)


def _import_folder(module: ModuleType) -> Path | None:
    """The folder in which Python has found the module or its package; None if it has no file."""
    file = getattr(module, "__file__", None)
    if not file:
        return None
    is_package = hasattr(module, "__path__")
    return Path(file).resolve().parents[module.__name__.count(".") + is_package]


def _reload_if_changed(module: ModuleType, folder: Path | None, visited: set[str]) -> bool:
    """Load a module of ``folder`` again if its source has changed, or that of one it uses.

    visited: names of modules that have been looked at. Returns whether it was loaded again. Objects
    of the former load keep their classes. After an error the module is as before.
    """
    name, file = module.__name__, Path(getattr(module, "__file__", None) or "").resolve()
    is_users = folder in file.parents and file.suffix == ".py" and file.is_file()
    if name in visited or not is_users or _PACKAGE in file.parents or name == "__main__":
        return False
    if sys.modules.get(name) is not module or "site-packages" in file.parts:
        return False
    visited.add(name)
    used = _imported_modules(file.read_bytes(), getattr(module, "__package__", ""))
    changes = [_reload_if_changed(other, folder, visited) for other in used]
    source = blake2b(file.read_bytes()).hexdigest()
    if getattr(module, _LOADED, source) == source and not any(changes):
        setattr(module, _LOADED, source)
        return False
    former = dict(vars(module))
    for key, value in former.items():  # names that the new source no longer has
        if not (key.startswith("__") or isinstance(value, ModuleType)):
            delattr(module, key)
    try:
        reload(module)
    except BaseException:
        vars(module).update(former)
        raise
    setattr(module, _LOADED, source)
    return True


def _imported_modules(source: bytes, package: str) -> list[ModuleType]:
    """The loaded modules that import statements of ``source``, a module of ``package``, name."""
    names: set[str] = set()
    with suppress(SyntaxError, ValueError, ImportError):  # a load of the source says what is wrong
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), package)
                names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return [sys.modules[name] for name in sorted(names) if sys.modules.get(name)]


def module_source(name: str) -> bytes:
    """The source of the module that ``import_object(name)`` imported; empty if it has no file."""
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    return Path(file).read_bytes() if file and Path(file).is_file() else b""


def describe_error(error: BaseException) -> str:
    """An exception of foreign code in one line.

    It has the text and, unless the text says enough, the type and the place of the error.
    """
    text = " ".join(str(error).split())
    if isinstance(error, ImportError | AttributeError | TypeError | ValueError) and not isinstance(
        error, UnicodeError
    ):
        return text
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    location = (
        f" ({Path(frame.tb_frame.f_code.co_filename).name}, line {frame.tb_lineno})"
        if frame
        else ""
    )
    return f"{type(error).__name__}{': ' if text else ''}{text}{location}"
