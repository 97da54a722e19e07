"""Write this folder's scripts: ``python jobs/make.py`` after a change of
``fedlora_mpi/experiment/slurm.py``.
"""

from pathlib import Path

from fedlora_mpi.experiment.slurm import (
    Job,
    array_task_lines,
    program_line,
    sbatch_script,
    status_command,
)

HERE = Path(__file__).parent
EDIT = """\
# Two lines to edit: the ##SBATCH line, with your cluster's names and one # less (if it wants them),
# and the one that begins with {what}=. Then, from the folder that has .venv:
#   sbatch {call}
# Before its time is up the job stops after a round, queues itself again and goes on.
"""
WHAT = {
    "cpu": "One node with CPUs: rank 0 is the server, eight ranks train.",
    "gpus": "One node with four GPUs: rank 0 is the server, each other rank has a GPU.",
    "nodes": "Two nodes with four GPUs each: rank 0 is the server, each other rank has a GPU.",
    "array": "Runs over seeds and methods, one core each: line n of a file is task n of an array. "
    "This makes\n# the file, and this script filled in beside it:\n"
    "#   fedlora-mpi reproduce table1 --scale full --seeds 1 2 3 --methods fedlora fedavg "
    "--print-jobs",
}
JOBS = {
    "cpu": {"ranks": 9},
    "gpus": {"ranks": 5, "gpus": 4},
    "nodes": {"ranks": 9, "nodes": 2, "gpus": 4},
    "array": {"ranks": 1, "array": 6},
}
RUN = (
    "run=(configs/cifar10.yaml)  # with settings: run=(configs/cifar10.yaml algorithm=fedavg "
    "seed=2)"
)
LISTED = "jobs=runs/reproduce-full/table1/jobs.txt"


def made(name: str) -> str:
    """The text of ``jobs/NAME.sbatch``."""
    if name == "array":
        job = Job(name="fedlora-array", log="slurm-%x-%A_%a.log", **JOBS[name])
        call = f"--array=1-$(wc -l < {LISTED.partition('=')[2]}) jobs/array.sbatch"
        return _script(job, WHAT[name], "jobs", call, LISTED, array_task_lines('"$jobs"'))
    job = Job(name=f"fedlora-{name}", log="slurm-%x-%j.log", **JOBS[name])
    body = RUN, program_line(job, 'run --resume "${run[@]}"')
    return _script(
        job,
        WHAT[name],
        "run",
        f"jobs/{name}.sbatch",
        *body,
        done_command=status_command('"${run[@]}"'),
    )


def _script(job: Job, what: str, edited: str, call: str, *body: str, **more: str) -> str:
    head = f"# {what}\n{EDIT.format(what=edited, call=call)}"
    return sbatch_script(job, "\n".join(body), comment_lines=head, **more)


if __name__ == "__main__":
    for name in JOBS:
        (HERE / f"{name}.sbatch").write_text(made(name))
