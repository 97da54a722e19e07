"""``mpirun ... python dying.py PLAN ARGUMENTS``: the package's command on ranks to which faults
happen.

PLAN is JSON, [[rank, moment, count, what], ...]: when this rank of MPI_COMM_WORLD comes to this
moment for this many times, it "dies" by SIGKILL, "hangs", hangs with Python's lock ("locks"), or,
two seconds later, "stops" by SIGSTOP.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections import Counter

from fedlora_mpi.cli import main
from fedlora_mpi.federation import round as rounds
from fedlora_mpi.mpi import comm
from fedlora_mpi.resilience import rebalancing as balance
from fedlora_mpi.run import checkpointing as saving
from fedlora_mpi.run import loop as run

PLAN = [tuple(fault) for fault in json.loads(sys.argv[1])]
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
FAULTS = {
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(1000),
    "stops": lambda: (time.sleep(2), os.kill(os.getpid(), signal.SIGSTOP)),
    "locks": lambda: ctypes.PyDLL(None).sleep(1000),
}
seen = Counter()


def at(moment):
    seen[moment] += 1
    for what, fault in FAULTS.items():
        if (RANK, moment, seen[moment], what) in PLAN:
            print(f"{what}: rank {RANK} at {moment} {seen[moment]}", file=sys.stderr, flush=True)
            fault()


def before(owner, name, moment):
    was = getattr(owner, name)

    def now(*given, **named):
        at(moment)
        return was(*given, **named)

    setattr(owner, name, now)


def after(owner, name, moment):
    was = getattr(owner, name)

    def now(*given, **named):
        found = was(*given, **named)
        at(moment)
        return found

    setattr(owner, name, now)


before(run, "build", "build")
before(rounds, "_train", "training")
before(rounds, "_keep", "client")
before(rounds, "_evaluate", "evaluation")
before(run, "balanced", "balance")
before(balance, "carried", "move")
after(balance, "carried", "moved")
before(run, "save", "checkpoint")
after(saving.checkpoint, "write_clients", "shard")
before(saving.checkpoint, "commit", "commit")
before(comm.Mpi, "sum", "sum")
before(comm.Mpi, "exchange", "exchange")
before(comm.Mpi, "gather", "gather")
after(comm.Mpi, "post", "copy")  # while the copies travel
before(comm.Mpi, "agree", "agree")
after(comm.Mpi, "_begin", "message")  # inside any message
before(comm.Mpi, "without_the_dead", "shrink")
before(comm.Mpi, "abort", "abort")

balance._WORTH = float(os.environ.get("TEST_WORTH", balance._WORTH))

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
