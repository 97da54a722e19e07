"""Parameters of a test that ``make test`` leaves to ``make test-all``."""

from typing import Any

import pytest


def thorough_param(*values: Any, id: str | None = None) -> Any:
    """A set of parameters that is a repetition of another one: only ``make test-all`` runs it."""
    return pytest.param(*values, marks=pytest.mark.thorough, id=id)


def tiered_param(*values: Any, id: str, thorough: bool) -> Any:
    """A set of parameters, in ``make test`` or, where it is ``thorough``, in ``make test-all``."""
    return pytest.param(*values, id=id, marks=[pytest.mark.thorough] if thorough else [])


# Of a federation whose clients train one by one or together: together in `make test`. For facts of
# which a test that loop and stack train alike, which is in `make test`, has the other half.
STACK_FIRST = pytest.mark.parametrize(
    "stacked", [thorough_param(False, id="loop"), pytest.param(True, id="stack")]
)
