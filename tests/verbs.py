"""Every verb of a communicator on real ranks, in messages of at most argv[1] items."""

import sys

import numpy as np

from fedlora_mpi.mpi import comm as comms

comms._MAX_ITEMS = int(sys.argv[1])
comm = comms.Mpi()
rank, ranks = comm.rank, comm.size
next_rank, previous_rank = (rank + 1) % ranks, (rank - 1) % ranks

numbers = np.arange(23).reshape(1, 23) * (rank + 1)
comm.sum(numbers)
assert (numbers == np.arange(23) * sum(range(1, ranks + 1))).all()
assert comm.broadcast(b"abc" * 50 if rank == 0 else b"") == b"abc" * 50

counts = [3 * r + 1 for r in range(ranks)]
gathered = comm.gather(np.full(counts[rank], rank + 0.5, np.float32), counts)
assert (gathered == np.repeat(np.arange(ranks) + 0.5, counts)).all()

counts_between = np.array([[(a * 5 + b * 3) % 11 for b in range(ranks)] for a in range(ranks)])
received_copy = np.zeros(31)
pending = comm.post(np.full(31, float(rank)), next_rank, received_copy, previous_rank)
send = np.repeat(100 * rank + np.arange(ranks, dtype=np.float32), counts_between[rank])
arrived = comm.exchange(send, counts_between[rank].tolist(), counts_between[:, rank].tolist())
assert (arrived == np.repeat(100 * np.arange(ranks) + rank, counts_between[:, rank])).all()
pending.wait()
assert pending.is_received() and (received_copy == previous_rank).all()
assert len(comm.exchange(np.empty(0, np.float32), [0] * ranks, [0] * ranks)) == 0
print("well", flush=True)
