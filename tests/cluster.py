"""A real Slurm cluster of one node for the tests, in a folder of its own, gone after them.

Needs Debian's ``slurm-wlm`` and ``munge`` (or their like) and two cores; it works for root and for
others.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from runs import process_environment, run_process, wait_until

SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
# cred_expire: how long a job that was queued again waits before it may start, seconds.
CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={home}/munge.socket,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.log
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
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores}
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE
"""


class Cluster:
    """Its ``env`` is what a user of the cluster has."""

    def __init__(self, home: Path) -> None:
        self.env = process_environment(SLURM_CONF=str(home / "slurm.conf"), PATH=SEARCH_PATH)

    def run_command(self, *line: str, cwd: Path = Path("/"), **env: str) -> str:
        """What a command of Slurm says; fails where it fails."""
        result = run_process(line, cwd, **self.env | env)
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


@contextmanager
def slurm_cluster(home: Path) -> Iterator[Cluster]:
    """A cluster that answers. Skips the test, with the reason, where there can be none."""
    programs = {
        name: shutil.which(name, path=SEARCH_PATH)
        for name in ("munged", "slurmctld", "slurmd", "sbatch")
    }
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    if (cores := len(os.sched_getaffinity(0))) < 2:
        pytest.skip("the cluster needs two cores")
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
    host = socket.gethostname().partition(".")[0]
    user = run_process(["id", "-un"], home).stdout.strip()
    conf = CONF.format(
        home=home, host=host, user=user, ports=_free_ports(2), cores=cores, plugins=plugins
    )
    (home / "slurm.conf").write_text(conf)
    (home / "plugstack.conf").touch()
    key = home / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    for name in ("state", "spool"):
        (home / name).mkdir()
    new_cluster = Cluster(home)
    munge = [
        f"--{name}={home}/munge.{name.partition('-')[0]}"
        for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")
    ]
    munge = [programs["munged"], "--force", "--foreground", "--num-threads=2", *munge]
    with ExitStack() as daemons:
        for line, ready_file in (
            (munge, home / "munge.socket"),
            ([programs["slurmctld"], "-D", "-i"], home / "slurmctld.pid"),
            ([programs["slurmd"], "-D"], home / "slurmd.pid"),
        ):
            daemons.enter_context(_run_daemon(line, home, new_cluster.env, ready_file))

        def is_idle():
            return (
                run_process(
                    ["sinfo", "--noheader", "--format=%T"], home, **new_cluster.env
                ).stdout.strip()
                == "idle"
            )

        _wait_or_skip(is_idle, "the node does not become idle", home)
        yield new_cluster
        run_process(["scancel", "--full", f"--user={user}"], home, **new_cluster.env)
        _wait_or_skip(
            lambda: not run_process(["squeue", "--noheader"], home, **new_cluster.env).stdout,
            "jobs stay",
            home,
        )


@contextmanager
def _run_daemon(
    line: list[str], home: Path, env: dict[str, str], ready_file: Path
) -> Iterator[None]:
    """A process in the foreground that has made the file ``there``."""
    with open(home / "daemons.log", "ab") as log:
        process = subprocess.Popen(line, cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_or_skip(ready_file.exists, f"{line[0]} does not start", home, process)
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_or_skip(
    condition, skip_reason: str, home: Path, process: subprocess.Popen | None = None
) -> None:
    """Until ``fact()``; skips the test when it does not come."""
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline or process is not None and process.poll() is not None:
            log_lines = (home / "daemons.log").read_text(errors="replace").strip().splitlines()
            pytest.skip(f"{skip_reason}: {log_lines[-1] if log_lines else 'no message'}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free_socket in sockets:
            free_socket.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
