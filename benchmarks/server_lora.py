"""What the server of FlexLoRA and FedHL does in a round at the size of ViT-B, beside the gather of
the clients' factors.

    python benchmarks/server_lora.py [--clients 100] [--layers 48]

Half of the layers are 768 x 768, half 768 x 3072; clients have the ranks 64, 32, 16, 16, 8, 8, 4,
4, 4, 4 in turn. Seconds of the slowest rank and peak memory of the largest process, one thread per
rank: the singular vectors of all layers (`right_vectors`) on 1 and 3 ranks, beside torch.linalg.svd
of one layer of each shape; the factors of all clients by a gather on 3 ranks; what they stand for,
added up exactly on one rank; the allreduce of that sum on 3 ranks. Correctness first: the singular
vectors of a layer are those of torch.linalg.svd.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from functools import partial

import numpy as np
import torch
from report import MPIRUN, arguments, tell

from fedlora_mpi.aggregation.exact_sum import SUM_TYPES
from fedlora_mpi.aggregation.flat_layout import Layout
from fedlora_mpi.aggregation.gathered import gather_remote_uploads
from fedlora_mpi.aggregation.svd import right_vectors
from fedlora_mpi.aggregation.term_layout import TermLayout
from fedlora_mpi.algorithm import Upload
from fedlora_mpi.algorithms.flexlora import FlexLoRA
from fedlora_mpi.components.lora import dense_updates
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.mpi.comm import Solo, connect

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)


def shapes(layers: int) -> dict[str, tuple[int, int]]:
    """{name: (out side, in side)}."""
    return {f"layer.{n}.weight": (768, 768 if n % 2 else 3072) for n in range(layers)}


def upload(layers: int, rank: int, client: int) -> dict[str, torch.Tensor]:
    """The factors of a client."""
    draw, tree = rng(1, "client", client), {}
    for name, (out_side, in_side) in shapes(layers).items():
        tree[f"{name}..A"] = torch.randn(rank, in_side, generator=draw) / in_side**0.5
        tree[f"{name}..B"] = torch.randn(out_side, rank, generator=draw) / 100
    return tree


def shared(layers: int) -> dict[str, torch.Tensor]:
    """The server's variables after some rounds: an update of full rank."""
    draw, tree = rng(1, "server"), {}
    for name, (out_side, in_side) in shapes(layers).items():
        tree[f"{name}..W"] = torch.randn(out_side, in_side, generator=draw) / 1000
        tree |= {
            f"{name}..A": torch.zeros(max(RANKS), in_side),
            f"{name}..B": torch.zeros(out_side, max(RANKS)),
        }
    return tree


def timed(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def vectors(comm, asked) -> dict:
    server = FlexLoRA(lora_ranks=RANKS)
    tree = shared(asked.layers)
    return {"seconds": timed(lambda: server.redistribute(tree, partial(right_vectors, comm)))}


def svd(comm, asked) -> dict:
    tall, wide = (torch.randn(size, generator=rng(1, "svd")) for size in ((768, 768), (768, 3072)))
    half = asked.layers / 2
    return {
        "seconds": half
        * sum(timed(lambda m=m: torch.linalg.svd(m, full_matrices=False)) for m in (tall, wide))
    }


def gather(comm, asked) -> dict:
    rank_of = {c: c % comm.size for c in range(asked.clients)}

    def pack(c):
        return torch.cat([v.flatten() for v in upload(asked.layers, RANKS[c % 10], c).values()])

    layouts = {r: Layout.of(upload(asked.layers, r, 0)) for r in set(RANKS)}
    own = {c: pack(c) for c in range(asked.clients) if rank_of[c] == comm.rank}
    of = {c: layouts[RANKS[c % 10]] for c in range(asked.clients)}
    return {
        "seconds": timed(lambda: gather_remote_uploads(comm, own, of, rank_of)),
        "bytes": 4 * sum(of[c].size for c in of),
    }


def added(comm, asked) -> dict:
    tree = shared(asked.layers)
    clients = {r: FlexLoRA(lora_ranks=(r,), alpha=float(r)) for r in set(RANKS)}
    layout = TermLayout.of(clients[4].make_term(Upload(upload(asked.layers, 4, 0)), tree, 1))
    message, seconds = SUM_TYPES["exact"](layout.size), 0.0

    def add(algorithm, sent):
        message.add(layout.pack(algorithm.make_term(Upload(sent), tree, 1), 1), 1)

    for c in range(asked.clients):
        sent, r = upload(asked.layers, RANKS[c % 10], c), RANKS[c % 10]
        seconds += timed(partial(add, clients[r], sent))
    return {"seconds": seconds, "bytes": message.buffer.nbytes}


def allreduce(comm, asked) -> dict:
    buffer = np.zeros((2, sum(a * b for a, b in shapes(asked.layers).values())), np.int64)
    return {"seconds": timed(lambda: comm.sum(buffer)), "bytes": buffer.nbytes}


PARTS = {part.__name__: part for part in (svd, vectors, gather, added, allreduce)}
LINES = (
    ("svd", 1, "torch.linalg.svd, from one layer of each shape"),
    ("vectors", 1, "right singular vectors of all layers, handed out"),
    ("vectors", 3, "the same, layers dealt to the ranks"),
    ("added", 1, "all clients' s B A, added up exactly"),
    ("gather", 3, "their factors, gathered on every rank"),
    ("allreduce", 3, "the exact sum of their s B A, by an allreduce"),
)


def part(name: str, asked: argparse.Namespace) -> None:
    """Measure on this rank; rank 0 prints the worst of all."""
    torch.set_num_threads(1)
    comm = connect() if asked.ranks > 1 else Solo()
    found = PARTS[name](comm, asked)
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    table = np.zeros((comm.size, len(found)))
    table[comm.rank] = list(found.values())
    comm.sum(table)
    if comm.rank == 0:
        print(json.dumps(dict(zip(found, table.max(0), strict=True))))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        return part(asked.part, asked)
    check()
    rows = []
    for name, ranks, said in LINES:
        launch = [MPIRUN[0], "-n", str(ranks), *MPIRUN[1:]] if ranks > 1 else []
        line = [*launch, sys.executable, __file__, "--part", name, "--ranks", str(ranks)]
        line += ["--clients", str(asked.clients), "--layers", str(asked.layers)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        found = json.loads(
            subprocess.run(line, env=env, capture_output=True, text=True, check=True).stdout
        )
        sent = {"MB sent or held": found["bytes"] / 1e6} if "bytes" in found else {}
        rows.append(
            {"what": said, "ranks": ranks, "s": found["seconds"], "MB peak": found["peak"] / 1e6}
            | sent
        )
    tell(asked, rows)


def check() -> None:
    """The vectors that a round uses span what torch.linalg.svd finds."""
    server, tree = FlexLoRA(lora_ranks=(4,)), shared(1)
    ((name, matrix),) = dense_updates(tree).items()
    ours = server.redistribute(tree, partial(right_vectors, Solo()))[f"{name}..A"]
    theirs = torch.linalg.svd(matrix, full_matrices=False).Vh[: len(ours)]
    wrong = float(((ours @ theirs.T).abs() - torch.eye(len(ours))).abs().max())
    assert wrong < 0.05, f"{name}: vectors are {wrong} from those of torch.linalg.svd"


if __name__ == "__main__":
    main()
