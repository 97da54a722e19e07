"""Runs on several nodes: namespaces of one machine, and TCP between them."""

import pytest
from runs import TINY, assert_same_run, command_line, run_process


@pytest.mark.thorough
def test_two_nodes_with_two_ranks_each_give_the_bits_of_one_process(make_nodes, trained, tmp_path):
    lab = make_nodes(2)
    before = [node.received_bytes() for node in lab.nodes]
    ended = run_process(lab.mpirun(*command_line("run", TINY, "output=run")), tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert_same_run(trained(), tmp_path / "run")
    received = [node.received_bytes() for node in lab.nodes]
    assert all(b - a > 100_000 for a, b in zip(before, received, strict=True))
