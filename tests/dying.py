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

from fedlora_mpi.aggregation.aggregator import Aggregator
from fedlora_mpi.cli import main
from fedlora_mpi.experiment import checkpointing as saving
from fedlora_mpi.experiment import loop as run
from fedlora_mpi.federation import round as rounds
from fedlora_mpi.mpi import comm
from fedlora_mpi.resilience import rebalancing as balance

PLAN = [tuple(fault) for fault in json.loads(sys.argv[1])]
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
FAULTS = {
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(1000),
    "stops": lambda: (time.sleep(2), os.kill(os.getpid(), signal.SIGSTOP)),
    "locks": lambda: ctypes.PyDLL(None).sleep(1000),
}
counts = Counter()


def trigger_faults(moment):
    counts[moment] += 1
    for what, fault in FAULTS.items():
        if (RANK, moment, counts[moment], what) in PLAN:
            print(f"{what}: rank {RANK} at {moment} {counts[moment]}", file=sys.stderr, flush=True)
            fault()


def fault_before(owner, name, moment):
    original = getattr(owner, name)

    def with_fault(*args, **kwargs):
        trigger_faults(moment)
        return original(*args, **kwargs)

    setattr(owner, name, with_fault)


def fault_after(owner, name, moment):
    original = getattr(owner, name)

    def with_fault(*args, **kwargs):
        result = original(*args, **kwargs)
        trigger_faults(moment)
        return result

    setattr(owner, name, with_fault)


fault_before(run, "build", "build")
fault_before(rounds, "train", "training")
fault_after(Aggregator, "add", "client")  # before its personal row is written
fault_before(rounds, "evaluate_clients", "evaluation")
fault_before(run, "rebalance", "balance")
fault_before(balance, "move_rows", "move")
fault_after(balance, "move_rows", "moved")
fault_before(run, "save_checkpoint", "checkpoint")
fault_after(saving.checkpoint, "write_clients", "shard")
fault_before(saving.checkpoint, "commit", "commit")
fault_before(comm.Mpi, "sum", "sum")
fault_before(comm.Mpi, "exchange", "exchange")
fault_before(comm.Mpi, "gather", "gather")
fault_after(comm.Mpi, "post", "copy")  # while the copies travel
fault_before(comm.Mpi, "agree", "agree")
fault_after(comm.Mpi, "_start", "message")  # inside any message
fault_before(comm.Mpi, "shrink", "shrink")
fault_before(comm.Mpi, "abort", "abort")

balance._MAX_TIME_RATIO = float(os.environ.get("TEST_WORTH", balance._MAX_TIME_RATIO))

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
