"""Several nodes on one machine for the tests: namespaces of Linux, joined by a network of their own.

Each node has its own host name, network, shared memory and /mnt; nodes share all other files and the
kernel. Messages between nodes are TCP over a switch. The network and all processes live in a PID
namespace that ends with the test, however the test ends: no link, mount or process stays on the
machine. Needs root, iproute2 and util-linux.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from runs import mpirun_command, run_process

_START_TIMEOUT = 60  # seconds
_UNSHARE = shlex.split("unshare --pid --net --mount --uts --ipc --fork --kill-child --mount-proc")

# Waits on its input, which closes when the process of the tests ends.
_SWITCH = r"""
set -e
cd "$1"
ip link add name switch type bridge
ip link set switch up
echo 127.0.0.1 localhost > hosts
for k in $(seq "$2"); do echo "10.77.0.$k node$k" >> hosts; done
for k in $(seq "$2"); do
  unshare --net --uts --mount --ipc bash -ec "$3" "node$k" &
  until [ -s "node$k.pid" ]; do kill -0 $!; sleep 0.01; done
  ip link add "switch$k" type veth peer name eth0 netns "$(cat "node$k.pid")"
  ip link set "switch$k" master switch up
  ./on "node$k" ip addr add "10.77.0.$k/24" dev eth0
  ./on "node$k" ip link set eth0 up
done
touch ready
read -r
"""
_NODE = r"""
hostname "$0"
ip link set lo up
mount -t tmpfs node /mnt
mount -t tmpfs node /dev/shm
mount --bind hosts /etc/hosts
readlink /proc/self/ns/net > "$0.network"
echo $$ > pid.tmp
mv pid.tmp "$0.pid"
exec sleep infinity
"""
# What ssh is to real nodes: NODE COMMAND...
_ON = r"""#!/bin/bash
node=$1 folder=$PWD
shift
pid=$(cat "{home}/$node.pid")
exec nsenter -t "$pid" --net --uts --mount --ipc env -C "$folder" TMPDIR=/dev/shm bash -c "$*"
"""


def processes_of_network(network: str) -> dict[int, str]:
    """{pid: program} of the processes in the network namespace ``network``, "net:[4026531833]"."""
    program_of = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if os.readlink(entry / "ns/net") == network:
                program_of[int(entry.name)] = (entry / "comm").read_text().strip()
    return program_of


class Node:
    """One of the nodes."""

    def __init__(self, lab: "NodeLab", number: int) -> None:
        self._lab, self.name = lab, f"node{number}"
        self._switch_port = f"switch{number}"
        self._network = (lab.home / f"{self.name}.network").read_text().strip()

    def command(self, *line: str | Path) -> list[str]:
        """The command line that runs ``line`` on this node, in the folder where it is started."""
        return self._lab.command(self._lab.agent, self.name, shlex.join(map(str, line)))

    def run(self, *line: str | Path, cwd: Path = Path("/")) -> str:
        """What a command on this node prints; fails where it fails."""
        return _run_command(self.command(*line), cwd)

    def processes(self, program: str) -> list[int]:
        """The processes of this node that run ``program``."""
        program_of = processes_of_network(self._network)
        return [pid for pid, name in program_of.items() if name == program]

    def kill(self, program: str) -> int:
        """SIGKILL to all processes of this node that run ``program``; how many there were."""
        pids = self.processes(program)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return len(pids)

    def cut_link(self) -> None:
        """Disconnect this node from the others."""
        self._lab.run("ip", "link", "set", self._switch_port, "down")

    def slow_link(self, kbit: int, loss: float) -> None:
        """Limit what this node receives and sends to ``kbit`` kbit/s, and lose a fraction of it.

        Without netem in the kernel, a short queue loses what does not fit. Skips the test where
        there is neither.
        """
        netem = f"netem rate {kbit}kbit loss {100 * loss:g}%"
        short_queue = f"tbf rate {kbit}kbit burst 4kb limit 9kb"  # 6 packets wait
        add = ["tc", "qdisc", "add", "dev", self._switch_port, "root"]
        for limit in (netem, short_queue):
            ended = run_process(self._lab.command(*add, *limit.split()), Path("/"))
            if ended.returncode == 0:
                self.run("tc", "qdisc", "add", "dev", "eth0", "root", *limit.split())
                return
            assert "qdisc kind is unknown" in ended.stderr, ended.stderr
        pytest.skip("the kernel has neither netem nor tbf to slow a link")

    def received_bytes(self) -> int:
        """How many bytes other nodes have sent to this one."""
        (link,) = json.loads(self.run("ip", "-json", "-statistics", "link", "show", "eth0"))
        return link["stats64"]["rx"]["bytes"]

    def lost_packets(self) -> int:
        """How many packets the slow link has lost so far, in both directions."""
        text = self.run("tc", "-s", "qdisc", "show", "dev", "eth0")
        text += self._lab.run("tc", "-s", "qdisc", "show", "dev", self._switch_port)
        return sum(map(int, re.findall(r"dropped (\d+)", text)))


class NodeLab:
    """Running nodes. ``home``: a folder of this lab's own."""

    def __init__(self, home: Path, pid: int, number: int) -> None:
        self.home, self.agent, self._pid = home, home / "on", pid
        self.nodes = [Node(self, k) for k in range(1, number + 1)]

    def command(self, *line: str | Path) -> list[str]:
        """The command line that runs ``line`` at the switch."""
        namespaces = f"/proc/{self._pid}/ns"
        enter = f"nsenter --pid={namespaces}/pid_for_children --mount={namespaces}/mnt"
        # what runs inside ends with what was started outside
        program = 'setpriv --pdeathsig KILL env -C "$PWD" "$@"'
        script = f"exec {enter} --net={namespaces}/net {program}"
        return ["bash", "-c", script, "switch", *map(str, line)]

    def run(self, *line: str | Path) -> str:
        """What a command at the switch prints; fails where it fails."""
        return _run_command(self.command(*line), Path("/"))

    def mpirun(self, *line: str | Path, ranks: int = 2, options: str = "") -> list[str]:
        """The command line of ``line`` on so many ``ranks`` of each node, started on node 1."""
        launcher = mpirun_command(ranks * len(self.nodes))
        hosts = ",".join(f"{node.name}:{ranks}" for node in self.nodes)
        settings = f"--prtemca plm_ssh_agent {self.agent} --prtemca plm_ssh_no_tree_spawn 1"
        return self.nodes[0].command(
            *launcher, *settings.split(), "--host", hosts, *options.split(), *line
        )


def _run_command(line: list[str], cwd: Path) -> str:
    ended = run_process(line, cwd)
    assert ended.returncode == 0, (line, ended.stderr)
    return ended.stdout


@contextmanager
def node_lab(home: Path, number: int) -> Iterator[NodeLab]:
    """So many running nodes. Skips the test, with the reason, where there can be none."""
    _check_machine()
    agent = home / "on"
    agent.write_text(_ON.format(home=home))
    agent.chmod(0o755)
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            [*_UNSHARE, "bash", "-c", _SWITCH, "switch", str(home), str(number), _NODE],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C in the terminal is for the tests
        )
    try:
        deadline = time.monotonic() + _START_TIMEOUT
        while not (home / "ready").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                reason = (home / "log").read_text().strip() or f"not ready in {_START_TIMEOUT} s"
                pytest.skip(f"this machine makes no nodes: {reason}")
            time.sleep(0.02)
        yield NodeLab(home, process.pid, number)
    finally:
        process.communicate()  # its input ends, and all processes of all nodes with it


def _check_machine() -> None:
    """Skip the test, with the reason, where nodes cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("only root can make nodes of namespaces")
    programs = ("ip", "nsenter", "setpriv", "unshare")
    if missing := [name for name in programs if not shutil.which(name)]:
        pytest.skip(f"no {', '.join(missing)}: apt-get install iproute2 util-linux")
