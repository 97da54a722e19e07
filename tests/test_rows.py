"""Personal leaves in files are those in memory; who is judged; what a large federation holds in
memory.
"""

import gc
import resource

import numpy as np
import pytest
import torch
from runs import (
    TINY,
    assert_same_run,
    build_tiny,
    command_line,
    create_run,
    mpirun_command,
    run_outcome,
    run_process,
)

from fedlora_mpi import cli, open_run
from fedlora_mpi.federation.client_store import DiskRows

DISK = "engine.personal=disk"


def test_rows_on_disk_keep_their_numbers_and_leave_no_file(tmp_path):
    rows, like = DiskRows(tmp_path), torch.zeros(3, 2)
    held = rows.allocate(1000, like)
    assert held.shape == (1000, 3, 2)
    held[:] = torch.arange(6000.0).view(1000, 3, 2)
    held[7] = -1
    rows.release()
    assert (held[7] == -1).all() and held[999, 2, 1] == 5999
    assert rows.allocate(0, like).shape == (0, 3, 2)
    assert rows.allocate(2, torch.zeros((), dtype=torch.float64)).dtype == torch.float64
    assert not list(tmp_path.iterdir())


def test_rows_that_nobody_holds_give_their_room_back(tmp_path):
    rows = DiskRows(tmp_path)
    held = rows.allocate(10, torch.zeros(5))
    assert len(rows._maps) == 1
    del held
    gc.collect()
    assert not rows._maps


def test_memory_holds_what_is_used(tmp_path):
    before = _resident()
    rows = DiskRows(tmp_path)
    held = rows.allocate(4000, torch.zeros(10_000))  # 160 MB
    held[:] = 1.0
    rows.release()
    assert _resident() - before < 20e6
    held[:10] = 2.0
    assert _resident() - before < 20e6 and held[10:].min() == held[3999].max() == 1.0


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("ranks", ["simulated", pytest.param("mpirun", marks=pytest.mark.thorough)])
def test_a_run_on_disk_has_the_bits_of_one_in_memory(ranks, trained, tmp_path):
    if ranks == "simulated":
        create_run(3, tmp_path / "disk", DISK)
    else:
        end = run_process(
            [*mpirun_command(3), *command_line("run", TINY, f"output={tmp_path / 'disk'}", DISK)],
            tmp_path,
        )
        assert end.returncode == 0, end.stderr
    assert_same_run(tmp_path / "disk", trained())
    assert not list((tmp_path / "disk").glob("tmp*"))


def test_without_a_gpu_rows_on_the_device_are_in_memory():
    rows = build_tiny("engine.personal=device").federation.store.rows
    assert rows == build_tiny().federation.store.rows


def test_a_run_goes_on_from_disk_to_memory_and_back(trained, tmp_path):
    def ask(*more):
        return cli.main(
            ["run", str(TINY), f"output={tmp_path / 'parts'}", "checkpoint.every=1", *more]
        )

    assert ask("rounds=1", DISK) == 0
    assert ask("rounds=2", "--resume") == 0
    assert ask("rounds=4", DISK, "--resume") == 0
    assert_same_run(tmp_path / "parts", trained())


def test_of_the_cohort_alone_is_judged_nobody_else(trained):
    everybody, judged = trained(), trained("evaluate.clients=cohort")
    all_, cohort = (open_run(run).array("clients/accuracy") for run in (everybody, judged))
    there = ~np.isnan(np.asarray(cohort))
    assert (there.sum(1) == 4).all() and not np.isnan(np.asarray(all_)).any()
    np.testing.assert_array_equal(np.asarray(cohort)[there], np.asarray(all_)[there])
    means = open_run(judged).rounds["accuracy"]
    np.testing.assert_allclose(means, np.nanmean(np.asarray(cohort), 1))
    assert run_outcome(everybody)["personal"] == run_outcome(judged)["personal"]
