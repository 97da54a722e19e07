"""How does the exact sum of a round grow with the ranks and with the numbers?

    python benchmarks/exchange.py [--ranks 2 4 8] [--numbers 100000 1000000] [--repeats 5]

Each cell is the median of the seconds of one sum over all ranks, by the slowest rank: `plain` moves
16 bytes a number, `compact` 8 of them wherever they suffice (between nodes a run does the latter).
The fit is t = a 2 ceil(log2 R) + b 2 (R - 1) / R bytes, with a >= 0 and b >= 0, to the `plain`
cells, all of them with the same relative weight; `fit` is its prediction over the measurement.
With more ranks than cores, or on one node, whose memory all ranks share, b grows with R: then the
fit says how far this machine is from a network. First: both sums have the same bits.
"""

import json
import math
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from report import MPIRUN, arguments, tell

from fedlora_mpi.aggregation.compact_sum import sum_limbs
from fedlora_mpi.aggregation.exact_sum import ExactSum
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.mpi.comm import connect


def measure_inside(numbers: list[int], repeats: int) -> None:
    """One rank: rank 0 prints {numbers: [seconds of plain, of compact, bytes of each]}."""
    torch.set_num_threads(1)
    comm, found = connect(), {}
    for size in numbers:
        message = ExactSum(size)
        message.add(0.05 * torch.randn(size, generator=rng(1, "exchange", comm.rank)), 487)
        first = message.buffer.copy()
        seconds: dict[str, list[float]] = {"plain": [], "compact": []}
        totals, sent = {}, {"plain": first.nbytes}
        for _ in range(repeats + 1):  # the first warms up
            for name in seconds:
                message.buffer = first.copy()
                comm.sum(np.zeros(1, np.int64))  # all ranks begin together
                begin = time.perf_counter()
                if name == "plain":
                    comm.sum(message.buffer)
                else:
                    sent[name] = sum_limbs(message.buffer, comm.size, comm.sum, comm.sum)
                seconds[name].append(time.perf_counter() - begin)
                totals[name] = message.total()
        assert torch.equal(totals["plain"], totals["compact"]), "the sums differ"
        for name, values in seconds.items():
            each = np.zeros((comm.size, repeats), np.int64)  # nanoseconds, exact in the sum
            each[comm.rank] = [round(1e9 * value) for value in values[1:]]
            comm.sum(each)
            slowest = statistics.median(each.max(0).tolist()) / 1e9
            found.setdefault(str(size), {})[name] = [slowest, sent[name]]
    if comm.rank == 0:
        print(json.dumps(found), flush=True)


def fit(cells: list[tuple[int, float, float]]) -> tuple[float, float]:
    """(a, b) of the two-parameter model for cells (ranks, bytes, seconds)."""
    terms = np.array([model_terms(ranks, size) for ranks, size, _ in cells])
    seconds = np.array([seconds for _, _, seconds in cells])
    relative, ones = terms / seconds[:, None], np.ones(len(cells))
    best, _ = min(
        ((x, float(np.square(relative @ x - ones).sum())) for x in candidates(relative, ones)),
        key=lambda pair: pair[1],
    )
    return float(best[0]), float(best[1])


def candidates(terms: np.ndarray, ones: np.ndarray) -> list[np.ndarray]:
    """The least squares with both parameters, or with one, none below 0."""
    found = [np.linalg.lstsq(terms, ones, rcond=None)[0]]
    for alone in range(2):
        x = np.zeros(2)
        x[alone] = terms[:, alone] @ ones / (terms[:, alone] @ terms[:, alone])
        found.append(x)
    return [x for x in found if (x >= 0).all()]


def model_terms(ranks: int, size: float) -> tuple[float, float]:
    """What a and b are multiplied by."""
    return 2 * math.ceil(math.log2(ranks)), 2 * (ranks - 1) / ranks * size


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 8, 16, 48])
    parser.add_argument("--numbers", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--inside", action="store_true", help="used by this script itself")
    asked = parser.parse_args()
    if asked.inside:
        return measure_inside(asked.numbers, asked.repeats)
    rows, cells = [], []
    for ranks in asked.ranks:
        line = [*MPIRUN[:1], "-n", str(ranks), *MPIRUN[1:], sys.executable, __file__, "--inside"]
        line += ["--repeats", str(asked.repeats), "--numbers", *map(str, asked.numbers)]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        for size, ways in json.loads(done.stdout.splitlines()[-1]).items():
            (plain, plain_bytes), (compact, compact_bytes) = ways["plain"], ways["compact"]
            cells.append((ranks, plain_bytes, plain))
            rows.append(
                {
                    "ranks": ranks,
                    "numbers": int(size),
                    "plain s": plain,
                    "compact s": compact,
                    "bytes a number": compact_bytes / int(size),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    a, b = fit(cells)
    for row, (ranks, size, seconds) in zip(rows, cells, strict=True):
        row["fit"] = float(np.dot(model_terms(ranks, size), (a, b))) / seconds
    print(f"a = {a:.3g} s, 1 / b = {1 / b / 1e9:.3g} GB/s" if b else f"a = {a:.3g} s, b = 0")
    tell(asked, rows)


if __name__ == "__main__":
    main()
