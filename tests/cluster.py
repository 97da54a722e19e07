"""A real Slurm cluster for the tests, in a folder of its own, gone after them.

Its one node is this machine, or its nodes are those of ``nodes/node_lab.py``. Needs Debian's
``slurm-wlm`` and ``munge`` (or their like) and two cores; one node works for root and for others.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from runs import process_environment, run_process, wait_until

SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
# cred_expire: how long a job that was queued again waits before it may start, seconds. Jobs of the
# partition "urgent" take the nodes of other jobs, which are queued again. GPUs are names alone.
CONF = """\
ClusterName=tests
SlurmctldHost={controller}
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={home}/munge.socket,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=5
ReturnToService=2
PluginDir={plugins}
PlugStackConfig={home}/plugstack.conf
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{gpu_types}{node_lines}
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""


class Host(NamedTuple):
    """A node of the cluster. command: ``command(*words)`` is the command line that runs there.

    gpus: how many GPUs Slurm believes in, at most 4.
    """

    name: str
    address: str
    cores: int
    command: Callable[..., list[str]]
    gpus: int = 0


class Cluster:
    """``env`` is what a user of the cluster has, who works on the first node."""

    def __init__(self, home: Path, hosts: Sequence[Host]) -> None:
        self.env = process_environment(SLURM_CONF=str(home / "slurm.conf"), PATH=SEARCH_PATH)
        self.command = hosts[0].command

    def run_command(self, *line: str | Path, cwd: Path = Path("/"), **env: str) -> str:
        """What a command says; fails where it fails."""
        result = run_process(self.command(*line), cwd, **self.env | env)
        assert result.returncode == 0, (line, result.stderr)
        return result.stdout

    def job_info(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.run_command("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(self, number: str, seconds: float = 300) -> dict[str, str]:
        """The job when it is in no queue any more."""
        end_states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return wait_until(
            lambda: (job := self.job_info(number))["JobState"] in end_states and job, seconds
        )


def _this_machine() -> Host:
    """This machine as a node. Skips the test where it has too few cores."""
    if (cores := len(os.sched_getaffinity(0))) < 2:
        pytest.skip("the cluster needs two cores")
    name = socket.gethostname().partition(".")[0]
    return Host(name, "127.0.0.1", cores, lambda *line: list(map(str, line)))


@contextmanager
def slurm_cluster(home: Path, hosts: Sequence[Host] = ()) -> Iterator[Cluster]:
    """A cluster of ``hosts`` that answers; without hosts, of this machine.

    Skips the test, with the reason, where Slurm is not installed or the machine has one core. An
    installed Slurm that does not start fails the test.
    """
    programs = {
        name: shutil.which(name, path=SEARCH_PATH)
        for name in ("munged", "slurmctld", "slurmd", "sbatch")
    }
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    plugins = next(
        (
            p.parent
            for lib in ("/usr/lib", "/usr/lib64")
            for p in Path(lib).glob("**/auth_munge.so")
        ),
        None,
    )
    if plugins is None:
        pytest.skip("Slurm has no plugin auth_munge.so under /usr/lib")
    hosts = hosts or [_this_machine()]
    user = run_process(["id", "-un"], home).stdout.strip()
    _write_settings(home, hosts, user, plugins)
    new_cluster = Cluster(home, hosts)
    munge_options = [
        f"--{name}={home}/munge.{name.partition('-')[0]}"
        for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")
    ]
    munge = [programs["munged"], "--force", "--foreground", "--num-threads=2", *munge_options]
    daemons = [
        (hosts[0].command(*munge), home / "munge.socket"),
        (hosts[0].command(programs["slurmctld"], "-D", "-i"), home / "slurmctld.pid"),
        *(
            (
                host.command(programs["slurmd"], "-D", "-N", host.name),
                home / f"slurmd-{host.name}.pid",
            )
            for host in hosts
        ),
    ]

    def says(*line: str) -> str:
        return run_process(hosts[0].command(*line), home, **new_cluster.env).stdout.strip()

    with ExitStack() as stack:
        for line, ready_file in daemons:
            stack.enter_context(_run_daemon(line, home, new_cluster.env, ready_file))
        _wait_or_fail(
            lambda: says("sinfo", "--noheader", "--partition=tests", "--format=%T") == "idle",
            "the nodes do not become idle",
            home,
        )
        yield new_cluster
        says("scancel", "--full", f"--user={user}")
        _wait_or_fail(lambda: not says("squeue", "--noheader"), "jobs stay", home)


def _write_settings(home: Path, hosts: Sequence[Host], user: str, plugins: Path) -> None:
    """Write what the daemons read, and make the folders that they write to."""
    node_lines = [
        f"NodeName={host.name} NodeAddr={host.address} CPUs={host.cores}"
        + (f" Gres=gpu:{host.gpus}" if host.gpus else "")
        for host in hosts
    ]
    settings = {
        "slurm.conf": CONF.format(
            home=home,
            controller=f"{hosts[0].name}({hosts[0].address})",
            user=user,
            ports=_free_ports(2),
            gpu_types="GresTypes=gpu\n" if any(host.gpus for host in hosts) else "",
            node_lines="\n".join(node_lines),
            plugins=plugins,
        ),
        "mpi.conf": "PMIxCliTmpDirBase=/dev/shm\n",  # each node has its own
        "plugstack.conf": "",
    }
    gres_lines = [
        f"NodeName={host.name} Name=gpu File=/dev/tty[0-{host.gpus - 1}]\n"
        for host in hosts
        if host.gpus
    ]
    settings["gres.conf"] = "AutoDetect=off\n" + "".join(gres_lines)
    for name, text in settings.items():
        (home / name).write_text(text)
    key = home / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    for folder in ("state", *(f"spool-{host.name}" for host in hosts)):
        (home / folder).mkdir()


@contextmanager
def _run_daemon(
    line: list[str], home: Path, env: dict[str, str], ready_file: Path
) -> Iterator[None]:
    """A process in the foreground that has made ``ready_file``."""
    with open(home / "daemons.log", "ab") as log:
        process = subprocess.Popen(line, cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_or_fail(ready_file.exists, f"{line[0]} does not start", home, process)
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_or_fail(
    condition, failure: str, home: Path, process: subprocess.Popen | None = None
) -> None:
    """Wait until ``condition()``; fail with the last line of the daemons when it does not come."""
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline or process is not None and process.poll() is not None:
            log_lines = (home / "daemons.log").read_text(errors="replace").strip().splitlines()
            pytest.fail(f"{failure}: {log_lines[-1] if log_lines else 'no message'}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free_socket in sockets:
            free_socket.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
