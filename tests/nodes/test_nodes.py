"""Runs on two nodes: namespaces of one machine, and TCP between them."""

import os
import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from node_lab import processes_of_network
from runs import (
    TESTS,
    TINY,
    assert_same_run,
    command_line,
    launch,
    package_lines,
    run_process,
    wait_until,
)


@pytest.mark.thorough
def test_two_nodes_with_two_ranks_each_give_the_bits_of_one_process(make_nodes, trained, tmp_path):
    lab = make_nodes(2)
    ended = run_process(lab.mpirun(*command_line("run", TINY, "output=run")), tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert_same_run(trained(), tmp_path / "run")
    assert all(node.received_bytes() > 100_000 for node in lab.nodes)


@pytest.mark.slow
def test_two_runs_side_by_side_on_the_same_nodes_do_not_disturb_each_other(
    make_nodes, trained, tmp_path
):
    lab, names = make_nodes(2), ["a", "b"]
    with ExitStack() as stack:
        both = [
            stack.enter_context(
                launch(lab.mpirun(*command_line("run", TINY, f"output={name}"), ranks=1), tmp_path)
            )
            for name in names
        ]
        errors = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    for name in names:
        assert_same_run(trained(), tmp_path / name)


# Debian's packages: launcher, library, mpi4py's name of it, and the options for ssh and hosts
LIBRARIES = {
    "mpich": (
        "mpiexec.mpich",
        "libmpich.so.12",
        "libmpi.so.12",
        "-launcher rsh -launcher-exec {agent} -hosts",
    ),
    "openmpi-bin": (
        "mpirun.openmpi",
        "libmpi.so.40",
        "libmpi.so.40",
        "--mca plm_rsh_agent {agent} --host",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("package", LIBRARIES)
def test_an_mpi_library_of_the_system_gives_the_same_bits(package, make_nodes, trained, tmp_path):
    launcher, library, name, options = LIBRARIES[package]
    if (path := shutil.which(launcher)) is None:
        pytest.skip(f"no {launcher}: apt-get install {package}")
    (library_path,) = Path(path).parents[1].glob(f"lib/*/{library}")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / name).symlink_to(library_path)
    search_path = f"{tmp_path / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    lab = make_nodes(2)
    options = options.format(agent=lab.agent).split()
    program = command_line("run", TINY, "output=run")
    line = lab.nodes[0].command(launcher, "-n", "2", *options, "node1,node2", *program)
    ended = run_process(
        line, tmp_path, timeout=600, MPI4PY_LIBMPI=name, LD_LIBRARY_PATH=search_path
    )
    assert ended.returncode == 0, ended.stderr
    assert all(node.received_bytes() > 100_000 for node in lab.nodes)
    assert_same_run(trained(), tmp_path / "run")


# /mnt is a folder that each node has for itself.


@pytest.mark.slow
def test_a_run_folder_that_nodes_do_not_share_is_refused_before_anything_is_written(
    make_nodes, tmp_path
):
    lab = make_nodes(2)
    line = lab.mpirun(*command_line("run", TINY, "output=/mnt/runs/a"), ranks=1)
    ended = run_process(line, tmp_path, timeout=600)
    assert ended.returncode == 2, ended.stderr
    assert package_lines(ended.stderr) == [
        "fedlora-mpi: output = /mnt/runs/a: rank 1 (host node2) does not see /mnt/runs, where "
        "rank 0 writes; give a folder that all nodes share"
    ]
    assert "round 1" not in ended.stderr
    assert [node.run("ls", "-A", "/mnt") for node in lab.nodes] == ["", ""]


@pytest.mark.slow
def test_data_that_differ_between_nodes_are_refused_before_anything_is_written(
    make_nodes, tmp_path
):
    lab = make_nodes(2)
    x, y = np.random.default_rng(3).random((60, 3, 8, 8), np.float32), np.arange(60) % 4
    for number, node in enumerate(lab.nodes):
        x[7] += number  # one sample of node 2 is another
        file = tmp_path / f"{number}.npz"
        np.savez(file, x_train=x, y_train=y, x_test=x[:20], y_test=y[:20], mean=0.0, std=1.0)
        node.run("cp", file, "/mnt/own.npz")
    config = tmp_path / "own.yaml"
    config.write_text(
        "data: {dataset: npz, path: /mnt/own.npz, partition: {kind: dirichlet_class, alpha: 0.7, clients: 5, minimum: 2}}\n"
        "model: {name: cnn, width: 4, hidden: 8}\nalgorithm: fedavg\nrounds: 1\n"
    )
    line = lab.mpirun(*command_line("run", config, "output=run"), ranks=1)
    ended = run_process(line, tmp_path, timeout=600)
    assert ended.returncode == 2, ended.stderr
    assert package_lines(ended.stderr) == [
        f"fedlora-mpi: {config}: rank 1 (host node2): training samples: not the same as on rank 0 "
        "(the first is number 7, from 0); give all nodes the same files, data.path = /mnt/own.npz"
    ]
    assert not (tmp_path / "run").exists()


# The nodes themselves.

_HOLD_NODES = """
import sys
from pathlib import Path
from node_lab import node_lab

with node_lab(Path(sys.argv[1]), 2) as lab:
    lab.nodes[1].run("sleep", "600")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_of_the_nodes_stays_when_the_tests_are_ended(number, tmp_path, interruptible):
    mounts = Path("/proc/mounts").read_text()
    line = [sys.executable, "-c", _HOLD_NODES, str(tmp_path)]
    with launch(line, tmp_path, PYTHONPATH=f"{TESTS / 'nodes'}:{TESTS}:{TESTS.parent}") as process:
        wait_until((tmp_path / "ready").exists, process=process)
        networks = [(tmp_path / f"node{k}.network").read_text().strip() for k in (1, 2)]
        assert all(map(processes_of_network, networks))
        process.send_signal(number)
        wait_until(lambda: not any(map(processes_of_network, networks)))
    assert not [path for path in Path("/sys/class/net").iterdir() if "switch" in path.name]
    assert Path("/proc/mounts").read_text() == mounts
