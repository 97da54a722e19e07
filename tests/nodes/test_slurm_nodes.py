"""Jobs on a real Slurm of three nodes: namespaces of one machine, and TCP between them."""

import re
import sys
from pathlib import Path

import pytest
from cluster import Host, slurm_cluster
from node_lab import node_lab
from runs import (
    SLOW,
    TESTS,
    TINY,
    assert_same_run,
    command_line,
    last_checkpoint,
    run_process,
    wait_until,
)

pytestmark = pytest.mark.slow
CORES = 12  # of each node; they exist for Slurm and for Open MPI's binding alone
ROUNDS = ["rounds=8", "checkpoint.every=2", SLOW]
ON_TWO_NODES = ["--nodes", "2", "--ranks", "2", "--time", "60"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with node_lab(tmp_path_factory.mktemp("nodes"), 3) as made:
        yield made


@pytest.fixture(scope="module")
def slurm(lab, tmp_path_factory):
    """The cluster, and an environment for its jobs."""
    hosts = [Host(node.name, node.name, CORES, node.command, gpus=4) for node in lab.nodes]
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), hosts) as made:
        made.env["HWLOC_SYNTHETIC"] = f"core:{CORES} pu:1"
        yield made


@pytest.fixture
def submit(slurm, tmp_path):
    """``submit(*words)``: queue the run ``tmp_path / "run"`` on two nodes; the job's number."""

    def queue(*words: str, pause: str = "0.1") -> str:
        line = command_line("submit", TINY, *ROUNDS, "output=run", *ON_TWO_NODES, *words)
        said = slurm.run_command(*line, cwd=tmp_path, TEST_PAUSE=pause)
        queued = re.match(r"job (\d+): 2 ranks on 2 node", said)
        assert queued, said
        return queued[1]

    return queue


@pytest.fixture
def wait_for_round(tmp_path):
    """Wait for the first checkpoint of the run ``tmp_path / "run"``."""
    return lambda: wait_until(lambda: last_checkpoint(tmp_path / "run") >= 2, 300)


def log_of(folder: Path) -> str:
    """What the jobs of the run in ``folder`` have printed."""
    return "".join(path.read_text(errors="replace") for path in folder.glob("*slurm-*.log"))


def nodes_of(slurm, number: str) -> set[str]:
    """The nodes of a job."""
    names = slurm.job_info(number)["NodeList"]
    return set(slurm.run_command("scontrol", "show", "hostnames", names).split())


def assert_completed(slurm, number: str, restarts: int, folder: Path) -> None:
    job = slurm.wait_for_job(number, 600)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", str(restarts)), log_of(folder)


def test_the_script_for_several_nodes_gives_the_bits_of_one_process(slurm, lab, trained, tmp_path):
    overrides = ["data.partition.clients=9", "data.partition.minimum=1"]
    text = (TESTS.parent / "jobs/nodes.sbatch").read_text()
    run_line = f"run=({TINY} {' '.join(overrides)} output=run)"
    text, edited = re.subn(r"^run=.*$", run_line, text, flags=re.MULTILINE)
    assert edited == 1
    (tmp_path / "nodes.sbatch").write_text(text)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    number = slurm.run_command("sbatch", "--parsable", "nodes.sbatch", cwd=tmp_path).strip()
    assert_completed(slurm, number, 0, tmp_path)
    assert_same_run(trained(*overrides), tmp_path / "run")


def test_a_job_on_two_nodes_that_is_told_to_stop_goes_on(
    slurm, submit, wait_for_round, trained, tmp_path
):
    number = submit()
    wait_for_round()
    slurm.run_command("scancel", "--batch", "--signal=USR1", number)
    assert_completed(slurm, number, 1, tmp_path)
    assert_same_run(trained(*ROUNDS), tmp_path / "run")


def test_a_cancelled_job_resumes(slurm, submit, wait_for_round, call, trained, tmp_path):
    number = submit()
    wait_for_round()
    slurm.run_command("scancel", number)
    assert slurm.wait_for_job(number)["JobState"] == "CANCELLED"
    codes = [call(name, tmp_path / "run")[0] for name in ("status", "resume", "status")]
    assert codes == [75, 0, 0]
    assert_same_run(trained(*ROUNDS), tmp_path / "run")


def test_a_job_that_a_more_urgent_one_displaces_goes_on(
    slurm, submit, wait_for_round, trained, tmp_path
):
    number = submit()
    wait_for_round()
    line = ["sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive"]
    urgent = slurm.run_command(*line, "--wrap=sleep 5", cwd=tmp_path).strip()
    assert slurm.wait_for_job(urgent)["JobState"] == "COMPLETED"
    assert_completed(slurm, number, 1, tmp_path)
    assert_same_run(trained(*ROUNDS), tmp_path / "run")


def test_a_job_ends_as_usual_on_a_node_that_is_drained(
    slurm, submit, wait_for_round, trained, tmp_path
):
    number = submit()
    wait_for_round()
    update = ["scontrol", "update", f"NodeName={max(nodes_of(slurm, number))}"]
    slurm.run_command(*update, "State=DRAIN", "Reason=test")
    try:
        assert_completed(slurm, number, 0, tmp_path)
    finally:
        slurm.run_command(*update, "State=RESUME")
    assert_same_run(trained(*ROUNDS), tmp_path / "run")


def test_two_jobs_side_by_side_on_the_same_nodes_do_not_disturb_each_other(
    slurm, submit, trained, tmp_path
):
    numbers = [submit("--partition", "tests", f"output=run-{name}") for name in "ab"]
    for number in numbers:
        assert_completed(slurm, number, 0, tmp_path)
    for name in "ab":
        assert_same_run(trained(*ROUNDS), tmp_path / f"run-{name}")


def test_an_array_of_runs_on_two_nodes_each(slurm, trained, tmp_path):
    words = ["sweep", TINY, "seed=1,2", "output=runs", "--slurm", *ON_TWO_NODES]
    said = slurm.run_command(*command_line(*words), cwd=tmp_path)
    number = re.search(r"job (\d+): 2 runs, 2 ranks on 2 node", said)[1]
    for task in (1, 2):
        assert_completed(slurm, f"{number}_{task}", 0, tmp_path)
        assert_same_run(trained(f"seed={task}"), tmp_path / f"runs/seed={task}")


def test_srun_starts_the_ranks_itself(slurm, trained, tmp_path):
    if "pmix" not in slurm.run_command("srun", "--mpi=list"):
        pytest.skip("this Slurm has no pmix: apt-get install libpmix-dev")
    line = ["srun", "--mpi=pmix", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2"]
    ended = run_process(
        [*slurm.command(*line), *command_line("run", TINY, "output=run")], tmp_path, **slurm.env
    )
    assert ended.returncode == 0, ended.stderr
    assert_same_run(trained(), tmp_path / "run")


# the last test, for the node stays dead
def test_a_job_whose_node_dies_goes_on_with_other_nodes(
    slurm, lab, submit, wait_for_round, trained, tmp_path
):
    number = submit()
    wait_for_round()
    name = max(nodes_of(slurm, number))
    (lost,) = [node for node in lab.nodes if node.name == name]
    for program in ("slurmd", "slurmstepd", "prted", Path(sys.executable).name):
        lost.kill(program)
    # a cluster says so itself after its SlurmdTimeout
    slurm.run_command("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=test")
    assert_completed(slurm, number, 1, tmp_path)
    assert name not in nodes_of(slurm, number)
    assert_same_run(trained(*ROUNDS), tmp_path / "run")
