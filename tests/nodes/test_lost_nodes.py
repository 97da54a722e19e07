"""Ranks, daemons and links that fail during a run on two nodes."""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from node_lab import Node
from runs import (
    SLOW,
    TINY,
    assert_same_run,
    command_line,
    last_checkpoint,
    launch,
    package_lines,
    wait_until,
)

pytestmark = pytest.mark.slow
ROUNDS = [SLOW, "rounds=8", "checkpoint.every=2"]
TOLERANT = "--with-ft ulfm"
PYTHON = Path(sys.executable).name  # the program of a rank


class Ending(NamedTuple):
    """How a run ended whose second node failed."""

    node: Node
    code: int
    errors: str


@pytest.fixture
def end_of_run(make_nodes, tmp_path):
    """``end_of_run(fail, *overrides)``: the Ending of the run ``tmp_path / "run"`` on two nodes,
    after ``fail(node)`` of the second node in round 3.
    """

    def run(fail, *overrides, ranks=1, options=""):
        lab = make_nodes(2)
        arguments = ["run", TINY, *ROUNDS, "output=run", "faults.timeout=15", *overrides]
        line = lab.mpirun(*command_line(*arguments), ranks=ranks, options=options)
        with launch(line, tmp_path, TEST_PAUSE="0.05") as process:
            wait_until(lambda: last_checkpoint(tmp_path / "run") >= 2, 300, process)
            fail(lab.nodes[1])
            wait_until(lambda: process.poll() is not None, 600)
            wait_until(lambda: not any(node.processes(PYTHON) for node in lab.nodes))
            for node in lab.nodes:
                node.kill("prted")  # one without a link goes on, and keeps the output open
            _, errors = process.communicate(timeout=20)
        return Ending(lab.nodes[1], process.returncode, errors)

    return run


def assert_resumes(call, run):
    """The run was not done, and is now."""
    codes = [call("status", run)[0], call("resume", run)[0], call("status", run)[0]]
    assert codes == [75, 0, 0]
    assert not (run / ".pulse").exists()


# Copies of rows are on the next rank: with "node" on the other node, with "slot" not all of them.
@pytest.mark.parametrize(
    "mapping, dead, source",
    [("slot", ["2", "3"], "from what was on disk"), ("node", ["1", "3"], "clients moved: ")],
    ids=["slot", "node"],
)
def test_the_other_node_goes_on_when_all_ranks_of_a_node_die(
    end_of_run, mapping, dead, source, trained, tmp_path
):
    def kill_ranks(node):
        assert node.kill(PYTHON) == 2

    options = f"{TOLERANT} --map-by {mapping}"
    ending = end_of_run(kill_ranks, "faults.tolerate=true", ranks=2, options=options)
    assert ending.code == 0, ending.errors
    lost = re.findall(r"^fedlora-mpi: lost rank ([\d, ]+):", ending.errors, re.M)
    assert sorted(", ".join(lost).split(", ")) == dead, ending.errors
    assert source in package_lines(ending.errors)[-1]
    assert not (tmp_path / "run/.pulse").exists()
    assert_same_run(trained(*ROUNDS), tmp_path / "run")


def test_a_run_whose_daemon_dies_ends_and_resumes(end_of_run, call, trained, tmp_path):
    ending = end_of_run(lambda node: node.kill("prted"), "faults.tolerate=true", options=TOLERANT)
    assert (ending.code, package_lines(ending.errors)) == (0, [])  # mpirun ends all, with code 0
    assert_resumes(call, tmp_path / "run")
    assert_same_run(trained(*ROUNDS), tmp_path / "run")


def test_a_run_whose_link_is_cut_ends_in_one_line_and_resumes(end_of_run, call, trained, tmp_path):
    ending = end_of_run(Node.cut_link)
    assert ending.code == 1, (ending.code, ending.errors)
    (line,) = package_lines(ending.errors)
    assert "all ranks wait for each other: their messages do not get through for 15 s" in line
    assert line.endswith("continue with 'mpirun -n 2 fedlora-mpi resume run'")
    assert_resumes(call, tmp_path / "run")
    assert_same_run(trained(*ROUNDS), tmp_path / "run")


def test_a_slow_link_that_loses_packets_changes_no_bit(end_of_run, trained, tmp_path):
    ending = end_of_run(lambda node: node.slow_link(500, loss=0.02), "faults.timeout=100")
    assert ending.code == 0, ending.errors
    assert ending.node.lost_packets()
    assert_same_run(trained(*ROUNDS), tmp_path / "run")
