"""Take a user's own arrays as a data set: the result of a function, or the arrays of an npz file.

What both may hold is ``OwnData``; ``own_checks`` says what does not fit.
"""

import inspect
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..core.paths import expand_home
from ..core.seeds import isolate_rng
from ..core.user_code import describe_error, import_object


class OwnData(NamedTuple):
    """The arrays or tensors of a data set of M training and M' test samples.

    A function may also return a dict with the same names. The type of ``x`` says what it is: uint8
    [M, H, W], [M, ch, H, W] or [M, H, W, ch] are images; floats [M, ch, H, W] or [M, H, W, ch] are
    images too, and floats of any other shape are vectors [M, F] or sequences [M, L, F]; integers
    [M, L] are token ids.
    """

    x_train: Any
    # [M] integers or texts: classes; for other targets of ``model.loss`` also [M] or [M, k] numbers
    y_train: Any
    x_test: Any
    y_test: Any
    client_train: Any = None  # [M] integers or texts: the client of each sample
    client_test: Any = None
    # [classes] texts; y counts them from 0, or has these texts. Of other targets: [k] names
    class_names: Any = None
    # [1], or one number for each channel or feature; of x / 255 for uint8, of x for floats
    mean: Any = None
    std: Any = None
    tokens: Any = None  # number of token ids; None: the largest in x, and 1
    padding: Any = None  # the token id that fills the end of a sequence; None: 0


def call_function(name: str, root: str) -> OwnData:
    """Return what the function ``module:function`` returns.

    If it has a parameter ``root``, it gets ``data.root``. The global generators have a stream of
    their own while it runs, the same on every rank. Raises ValueError.
    """
    setting = f"dataset = {name}"
    try:
        function = import_object(name)
        arguments = {"root": str(expand_home(root))} if _takes_root(function) else {}
        with isolate_rng(0, "dataset", name):
            result = function(**arguments)
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        raise ValueError(f"{setting}: gives no data: {describe_error(error)}") from error
    entries = result._asdict() if hasattr(result, "_asdict") else result
    if not isinstance(entries, Mapping):
        needed = ", ".join(_required_names())
        raise ValueError(
            f"{setting}: returned {type(result).__name__}; return a dict with {needed}"
        )
    return _from_entries(setting, entries)


def read_npz(path: str) -> OwnData:
    """Return the arrays of an npz file; pickled ones are refused. Raises ValueError."""
    setting, name = f"path = {path}", ""
    try:
        with np.load(expand_home(path), allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            entries = {}
            for name in file.files:
                entries[name] = file[name]
    except OSError as error:
        raise ValueError(
            f"{setting}: cannot be read ({error.strerror or error}); give an npz file"
        ) from error
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            which = f"{name} is" if name else "it is"
            raise ValueError(
                f"{setting}: {which} a pickle, which may run anything and is not read; save "
                "arrays of numbers or of fixed-length text with numpy.savez"
            ) from error
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{setting}: is no npz file that can be read ({why}); write it with numpy.savez"
        ) from error
    return _from_entries(setting, entries)


def _takes_root(function: Any) -> bool:
    try:
        return "root" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # the call says what is wrong with it
        return False


def _required_names() -> list[str]:
    return [name for name in OwnData._fields if name not in OwnData._field_defaults]


def _from_entries(setting: str, entries: Mapping[str, Any]) -> OwnData:
    """Return the entries by name; raise ValueError if one is missing or unknown."""
    missing = [name for name in _required_names() if entries.get(name) is None]
    if missing:
        names = ", ".join(map(str, entries)) or "nothing"
        raise ValueError(f"{setting}: has no {missing[0]}; there is {names}")
    unknown = [name for name in entries if name not in OwnData._fields]
    if unknown:
        raise ValueError(
            f"{setting}: {unknown[0]} is no entry of a data set; allowed are "
            f"{', '.join(OwnData._fields)}"
        )
    return OwnData(**entries)
