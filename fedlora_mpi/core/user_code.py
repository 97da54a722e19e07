"""Imports the user's modules that a config names; no other file does."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from . import bounds, tree, vision
from .seeds import isolate_rng

# Former names of modules that users' files may still import.
FORMER_MODULES = {"fedlora_mpi.bounds": bounds, "fedlora_mpi.tree": tree}


def import_object(name: str) -> Any:
    """The object that ``your.module:Name`` names.

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
