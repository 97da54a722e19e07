"""The nodes of the tests in this folder."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from node_lab import NodeLab, node_lab


@pytest.fixture
def make_nodes(tmp_path_factory) -> Iterator[Callable[[int], NodeLab]]:
    """``make_nodes(3)``: three nodes that are gone after the test."""
    with ExitStack() as stack:
        yield lambda number: stack.enter_context(node_lab(tmp_path_factory.mktemp("nodes"), number))
