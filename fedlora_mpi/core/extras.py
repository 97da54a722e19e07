"""Import libraries that not every installation has: the extras of setup.py."""

from collections.abc import Iterator
from contextlib import contextmanager

from .escapes import summarize_error

_NAMES = {"sklearn": "scikit-learn"}  # of modules that pip knows under another name


@contextmanager
def extra_imports(module: str, extra: str, purpose: str = "", or_else: str = "") -> Iterator[None]:
    """Turn an import that fails inside into a ValueError with one line.

    module: the library's top module; purpose: what needs it, in front of the line; or_else: what
    can be done without it, behind the line.
    """
    try:
        yield
    except Exception as error:  # what is badly installed may raise anything
        front, name = f"{purpose}: " if purpose else "", _NAMES.get(module, module)
        way_out = f"pip install 'fedlora-mpi[{extra}]'{f', or {or_else}' if or_else else ''}"
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            raise ValueError(f"{front}{name} is not installed; {way_out}") from error
        raise ValueError(
            f"{front}{name} cannot be imported ({summarize_error(error)}); {way_out}"
        ) from error
