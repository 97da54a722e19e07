"""Paths as users give them."""

import errno
import os
from pathlib import Path

# What the system says of a path that a user has to give otherwise.
_MISTAKES = {
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
}


def expanded(path: str | Path) -> Path:
    """``path`` with the home folder in the place of ``~``. Raises ValueError where there is no such
    user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0].removeprefix("~")
        raise ValueError(
            f"{path}: there is no home folder of {user or 'this user'}; give the whole path"
        ) from None


def require_path(key: str, path: str) -> None:
    """Raise ValueError, about the setting ``key``, where the system could never have such a path."""
    try:
        os.lstat(expanded(path))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{key} = {describe(error)}") from None
    except ValueError as error:
        raise ValueError(f"{key} = {error}") from None


def is_mistake(error: OSError) -> bool:
    """Whether the system refuses a path that the user has given, such as one that is too long."""
    return error.errno in _MISTAKES and error.filename is not None


def describe(error: OSError) -> str:
    """One line for such a path."""
    name = os.fsdecode(error.filename)
    shown = name if len(name) <= 200 else f"{name[:120]}...{name[-60:]}"
    return f"{shown}: {error.strerror}; give another path"
