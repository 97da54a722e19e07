"""Read a folder that LEAF (Caldas et al., 2018) has prepared: FEMNIST, or vectors of numbers.

ROOT/train/ and ROOT/test/ hold files of {"users": [user], "user_data": {user: {"x": [[number]],
"y": [class]}}}. Each user is a client.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.paths import expand_home
from .own import OwnData

_FEMNIST_PIXELS = 28 * 28  # grey values from 0 to 1, the rows one after another


class _Side(NamedTuple):
    """The samples of training or of testing."""

    x: np.ndarray  # [M, F] float32, or [M, 1, 28, 28] for FEMNIST
    y: np.ndarray  # [M]
    users: np.ndarray  # [M] texts


def read_leaf(root: str) -> OwnData:
    """Return the samples of ROOT/train/*.json and ROOT/test/*.json with their users.

    Raises ValueError with the file for what is not LEAF's, and for users that only one folder has.
    """
    train, test = (_read_side(root, side) for side in ("train", "test"))
    if lonely := sorted({*train.users} ^ {*test.users}):
        raise ValueError(
            f"data.root = {root}: {len(lonely)} users (first: {lonely[0]}) are in only one of "
            "train/ and test/; let LEAF's preprocess.sh split by sample (-t sample)"
        )
    return OwnData(train.x, train.y, test.x, test.y, train.users, test.users)


def _read_side(root: str, side: str) -> _Side:
    """Return the samples of all files of a folder, in the order of the files' names."""
    folder = expand_home(root) / side
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(
            f"data.root = {root}: there is no file {side}/*.json; give the folder data/ of a data "
            "set of LEAF after its preprocess.sh"
        )
    samples = [
        (row, label, user)
        for file in files
        for user, data in _read_users(f"data.root = {root}: {side}/{file.name}", file).items()
        for row, label in zip(data["x"], data["y"], strict=True)
    ]
    try:
        x = np.array([row for row, _, _ in samples], np.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"data.root = {root}: {side}/: x must be rows of equally many numbers; texts of LEAF "
            "are not read"
        ) from error
    if x.ndim == 2 and x.shape[1] == _FEMNIST_PIXELS:
        x = x.reshape(-1, 1, 28, 28)
    return _Side(
        x, np.array([label for _, label, _ in samples]), np.array([user for *_, user in samples])
    )


def _read_users(location: str, file: Path) -> dict[str, Any]:
    """Return the samples by user of one file."""
    try:
        content = json.loads(file.read_bytes())
        users = {user: content["user_data"][user] for user in content["users"]}
        lengths = {user: (len(data["x"]), len(data["y"])) for user, data in users.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{location}: is no file of LEAF ({type(error).__name__}: {error}); it must hold users "
            "and user_data"
        ) from error
    for user, (inputs, labels) in lengths.items():
        if inputs != labels:
            raise ValueError(f"{location}: user {user} has {inputs} inputs and {labels} labels")
    return users
