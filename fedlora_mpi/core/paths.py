"""Paths as users give them."""

import errno
import os
from pathlib import Path

# Error numbers of the system for a path that the user has to change.
_USER_ERRNOS = {
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
}


def expand_home(path: str | Path) -> Path:
    """``path`` with the home folder for ``~``. Raises ValueError if there is no such user, or if it
    is no path.
    """
    if not isinstance(path, str | Path):
        raise ValueError(f"{path!r}: is no path; give a text or a pathlib.Path")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0].removeprefix("~")
        raise ValueError(
            f"{path}: there is no home folder of {user or 'this user'}; give the whole path"
        ) from None


def check_path(key: str, path: str) -> None:
    """Raise ValueError for the setting ``key`` if ``path`` cannot be a path on this system."""
    try:
        os.lstat(expand_home(path))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{key} = {describe_path_error(error)}") from None
    except ValueError as error:
        raise ValueError(f"{key} = {error}") from None


def is_path_error(error: OSError) -> bool:
    """Whether the system refuses the user's path, for instance because it is too long."""
    return error.errno in _USER_ERRNOS and error.filename is not None


def describe_path_error(error: OSError) -> str:
    """One line that explains an error about a user's path."""
    name = os.fsdecode(error.filename)
    short_name = name if len(name) <= 200 else f"{name[:120]}...{name[-60:]}"
    return f"{short_name}: {error.strerror}; give another path"
