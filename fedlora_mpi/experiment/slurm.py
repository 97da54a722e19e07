"""Slurm scripts: for ``jobs/``, ``submit``, ``sweep --slurm`` and ``reproduce --print-jobs``.

A job is told to stop by SIGUSR1, two minutes before its time is up or by ``scancel``. It then ends
its round, writes a checkpoint, exits with STOPPED_EXIT and requeues itself. Its next start
continues the run.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config
from ..core.bounds import bounded
from ..core.escapes import escape_line
from ..core.paths import expand_home
from ..store.files import write_atomic
from .loop import STOPPED_EXIT

SIGNAL_LEAD = (
    120  # seconds between SIGUSR1 and the end of a job's time: a round and a checkpoint must fit
)
_CPU_RANKS_PER_NODE = 9  # ranks on a node without GPUs, unless told otherwise
_NAME_PATTERN = re.compile(r"[\w.,@:/+-]+")
_MEMORY_PATTERN = re.compile(r"\d+[KMGT]?")
_FEATURES_PATTERN = re.compile(r"[\w.,@:/+&|*()\[\]-]+")
_TIME_PATTERN = re.compile(r"\d+|(\d+-)?\d+(:\d+){1,2}|\d+-\d+")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a script requests from Slurm.

    ranks: of the whole job; gpus: per node; array: number of tasks, 0: no array; array_limit: tasks
    at once, 0: any number.
    """

    name: str
    log: str
    ranks: int
    nodes: int = 1
    gpus: int = 0
    threads: int = 1
    time: str = "12:00:00"
    partition: str | None = None
    account: str | None = None
    mem: str | None = None  # per node
    qos: str | None = None
    constraint: str | None = None  # features of the nodes
    array: int = 0
    array_limit: int = 0
    tolerates_failures: bool = False  # whether its run tolerates the death of a worker

    def __post_init__(self) -> None:
        bounded(
            self,
            nodes="[1, inf)",
            gpus="[0, inf)",
            ranks="[1, inf)",
            threads="[1, inf)",
            array="[0, inf)",
            array_limit="[0, inf)",
        )
        if self.ranks < self.nodes:
            raise ValueError(
                f"ranks = {self.ranks}: must be at least one for each of {self.nodes} nodes"
            )
        if not _TIME_PATTERN.fullmatch(self.time):
            raise ValueError(
                f"time = {self.time}: must be minutes, HH:MM:SS or D-HH:MM:SS, for instance "
                "12:00:00"
            )
        if self.mem is not None and not _MEMORY_PATTERN.fullmatch(self.mem):
            raise ValueError(
                f"mem = {self.mem}: must be an integer with K, M, G or T, for instance 64G"
            )
        if self.constraint is not None and not _FEATURES_PATTERN.fullmatch(self.constraint):
            raise ValueError(
                f"constraint = {self.constraint!r}: must be features of nodes, for instance a100 "
                "or 'a100|h100'; sinfo -o %f lists them"
            )
        for field in ("partition", "account", "qos"):
            if (value := getattr(self, field)) is not None and not _NAME_PATTERN.fullmatch(value):
                raise ValueError(
                    f"{field} = {value!r}: must be a name that Slurm knows; sinfo and sacctmgr "
                    "list them"
                )

    @property
    def ranks_per_node(self) -> int:
        """The rank slots of each node. mpirun assigns ranks to the nodes in turn."""
        return -(-self.ranks // self.nodes)


def sbatch_script(
    job: Job,
    body: str,
    *,
    comment_lines: str = "",
    bin_folder: str = "$PWD/.venv/bin",
    done_command: str = "true",
) -> str:
    """Return the text of an sbatch script.

    body: shell lines that end with the program, in the foreground. The program must end on SIGUSR1
    with code STOPPED_EXIT. bin_folder: the folder with python and mpirun. done_command: a shell
    command that exits with 0 when all is done, and with STOPPED_EXIT when rounds are left. It is
    needed because mpirun also exits with 0 when a node was lost.
    """
    return (
        f"#!/bin/bash\n{comment_lines}{_directive_lines(job)}\n"
        f'export PATH="{bin_folder}:$PATH"\n'
        f"{_binding_lines(job)}{_MPS_LINES if job.gpus else ''}{body.rstrip()} "
        f"&\n{_WAIT_LINES.replace('IS_DONE', done_command)}"
    )


def program_line(job: Job, arguments: str) -> str:
    """Return the shell line that runs ``arguments``, already quoted, on all ranks of the job."""
    python = f"python -m fedlora_mpi {arguments}"
    count = '"$SLURM_NTASKS"' if job.ranks == job.nodes * job.ranks_per_node else job.ranks
    return (
        python
        if job.ranks == 1
        else f"mpirun {'--with-ft ulfm ' if job.tolerates_failures else ''}-n {count} {python}"
    )


def status_command(arguments: str) -> str:
    """Return the shell command that checks whether ``run --resume ARGUMENTS`` (quoted) is done."""
    return f"python -m fedlora_mpi status {arguments}"


def array_task_lines(list_file: str) -> str:
    """Return shell lines that run line n of ``list_file`` (shell-quoted) as task n of an array."""
    return f'line=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {list_file})\nbash -c "$line"'


def array_status_command() -> str:
    """Return the shell command that checks the run of ``array_task_lines``."""
    return f'bash -c "{status_command("${line#*run --resume }")}"'


def job_for(config: Config, config_file: str | Path, **options: Any) -> Job:
    """Return the job of a config. Raises ValueError.

    Unless ``options`` states the ranks, there are the server and a worker per GPU, or nine ranks on
    a node without GPUs, but never more workers than clients.
    """
    options = {name: value for name, value in options.items() if value is not None}
    nodes, gpus, server = (
        options.get("nodes", 1),
        options.get("gpus", 0),
        int(not config.server_hosts_clients),
    )
    rank_slots = nodes * gpus + server if gpus else nodes * _CPU_RANKS_PER_NODE
    folder = expand_home(config.output)
    defaults: dict[str, Any] = {
        "name": re.sub(r"[^\w.-]", "-", Path(config_file).stem),
        "log": f"{folder}.slurm-%j.log",  # beside the run folder, which the run creates itself
        "ranks": max(nodes, min(rank_slots, config.data.partition.clients + server)),
        "threads": config.engine.threads,
        "tolerates_failures": config.faults.tolerate,
    }
    try:
        return Job(**defaults | options)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def submit(
    config: Config,
    config_file: str,
    overrides: Sequence[str],
    dry_run: bool,
    **options: str | int | None,
) -> str:
    """Queue a run and return a message for the user; with ``dry_run`` the script.

    config: what ``config_file`` and ``overrides`` say; the job reads them again. Raises ValueError.
    """
    job = job_for(config, config_file, **options)
    arguments = shlex.join([str(config_file), *overrides])
    text = sbatch_script(
        job,
        program_line(job, f"run --resume {arguments}"),
        bin_folder=_bin_folder(),
        done_command=status_command(arguments),
    )
    if dry_run:
        return text.rstrip()
    number = _queue(text, job)
    return escape_line(
        f"job {number}: {job.ranks} ranks on {job.nodes} node(s), output in "
        f"{job.log.replace('%j', number)}"
    )


def submit_array(
    config: Config,
    config_file: str,
    all_arguments: Sequence[Sequence[str]],
    folder: Path,
    dry_run: bool,
    **options: Any,
) -> str:
    """Queue runs as one array: task n is ``run --resume`` with the n-th of ``all_arguments``.

    config: of the run that needs most; folder: for the list of runs and their output. Returns a
    message for the user; with ``dry_run`` the script. Raises ValueError.
    """
    log, lines_file = f"{folder}/slurm-%A_%a.log", folder / "jobs.txt"
    job = job_for(config, config_file, **options, array=len(all_arguments), log=log)
    lines = [
        f"exec {program_line(job, f'run --resume {shlex.join(arguments)}')}\n"
        for arguments in all_arguments
    ]
    text = sbatch_script(
        job,
        array_task_lines(shlex.quote(str(lines_file))),
        bin_folder=_bin_folder(),
        done_command=array_status_command(),
    )
    if dry_run:
        return text.rstrip()
    _find_sbatch()  # before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(lines_file, "".join(lines).encode(), folder)
    number = _queue(text, job)
    each = f"{job.ranks} ranks on {job.nodes} node(s) each"
    output = job.log.replace("%A", number).replace("%a", "*")
    return escape_line(f"job {number}: {job.array} runs, {each}, output in {output}")


def _bin_folder() -> str:
    """Return the folder of this Python, for a shell."""
    return shlex.quote(str(Path(sys.executable).parent))


def _find_sbatch() -> str:
    """Return Slurm's program. Raises ValueError."""
    if (sbatch := shutil.which("sbatch")) is None:
        raise ValueError(
            "no sbatch on PATH: submit on a login node of a Slurm cluster, or look with --dry-run"
        )
    return sbatch


def _queue(text: str, job: Job) -> str:
    """Pass a script to Slurm and return the number of the job. Raises ValueError."""
    sbatch = _find_sbatch()
    # Slurm drops the output of a job if this folder is missing
    Path(job.log).parent.mkdir(parents=True, exist_ok=True)
    result = subprocess.run([sbatch, "--parsable"], input=text, capture_output=True, text=True)
    if result.returncode:
        reason = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise ValueError(f"{sbatch} refused the job: {reason}")
    return result.stdout.strip().partition(";")[0]


def _directive_lines(job: Job) -> str:
    flags = [
        f"--{name}={value}" for name in ("account", "partition") if (value := getattr(job, name))
    ]
    account_line = (
        f"#SBATCH {' '.join(flags)}"
        if flags
        else "##SBATCH --account=ACCOUNT --partition=PARTITION"
    )
    requests = [
        f"--{name}={_quote_word(value)}"
        for name in ("mem", "qos", "constraint")
        if (value := getattr(job, name))
    ]
    limit = f"%{job.array_limit}" if job.array_limit else ""
    lines = [
        f"#SBATCH --job-name={job.name}",
        account_line,
        *([f"#SBATCH {' '.join(requests)}"] if requests else []),
        *([f"#SBATCH --array=1-{job.array}{limit}"] if job.array else []),
        f"#SBATCH --nodes={job.nodes} --ntasks-per-node={job.ranks_per_node} "
        f"--ntasks={job.nodes * job.ranks_per_node} --cpus-per-task={job.threads}",
        *([f"#SBATCH --gpus-per-node={job.gpus}"] if job.gpus else []),
        f"#SBATCH --time={job.time} --signal=B:USR1@{SIGNAL_LEAD}",
        "#SBATCH --requeue --open-mode=append",
        f"#SBATCH --output={_quote_word(job.log)}",
    ]
    return "\n".join(lines)


def _quote_word(text: str) -> str:
    """Return ``text`` as one word for sbatch, which interprets double quotes and backslashes."""
    return (
        text
        if re.fullmatch(r"[\w.,@:/+%-]+", text)
        else '"' + re.sub(r'["\\]', r"\\\g<0>", text) + '"'
    )


def _binding_lines(job: Job) -> str:
    """Return the shell lines that bind ranks to cores and assign them to the nodes in turn.

    So all nodes have equally many ranks.
    """
    if job.ranks == 1:
        return ""
    mapping = "slot" if job.nodes == 1 else "node"
    return (
        "# Each rank on cores of its own; these are Open MPI's names, other libraries have their "
        "own.\nexport PRTE_MCA_hwloc_default_binding_policy=core\n"
        f"export PRTE_MCA_rmaps_default_mapping_policy={mapping}:pe={job.threads}\n"
    )


_MPS_LINES = """\
# MPS=yes sbatch ...: NVIDIA's server lets several workers compute on a GPU at once; give it more --ntasks.
if [ "${MPS:-no}" = yes ]; then
  export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps-$SLURM_JOB_ID CUDA_MPS_LOG_DIRECTORY=/tmp/mps-$SLURM_JOB_ID
  # On every node; in the foreground (-f), for Slurm ends what a finished step leaves behind.
  srun --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 bash -c \\
    'mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" && exec nvidia-cuda-mps-control -f' &
  sleep 10
fi
"""  # noqa: E501

# Code 138: SIGUSR1 came before the program handled it. ``wait`` returns early after the trap ran.
# mpirun exits with 0 when a node's daemon was lost: such a run is not done, so it is queued again.
_WAIT_LINES = f"""\
launcher=$!
trap 'kill -USR1 $launcher' USR1
while wait $launcher; code=$?; kill -0 $launcher 2>/dev/null; do :; done
if [ $code -eq 0 ]; then IS_DONE; code=$?; fi
if [ $code -eq {STOPPED_EXIT} ] || [ $code -eq 138 ]; then  # told to stop, or cut short: queued again, it goes on
  scontrol requeue "${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
fi
exit $code
"""  # noqa: E501
