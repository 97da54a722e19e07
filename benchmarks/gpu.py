"""What a GPU does with the paper's CIFAR-10 cell: first whether it is right, then how fast, in one
command.

    python benchmarks/gpu.py [--minutes 8] [--json FILE]   # one GPU; with mpirun, several ranks
    python benchmarks/gpu.py --device cpu --quick          # a small task: about a minute

The cell: 40 clients of 500 images of 32x32, ResNet-8, batch 100, five epochs, on random images
(what they show costs nothing). A row is a way to compute a round of `play` (training, mean,
evaluation): the median of the rounds after the first two, which warm up and record and are given
apart. `plain` is a loop over clients of an nn.Module in channels_last with torch.optim.SGD on the
same device, from the same resident images, with no round around it. A check that fails is told
with its traceback; the others and the measurements go on, and the exit code is 1. A measurement
for which no time is left says so. The package need not be installed.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import torch
from report import MPIRUN, arguments, table, tell
from throughput import bare_loop

from fedlora_mpi.config import from_dict
from fedlora_mpi.engine.memory import MemoryBudget
from fedlora_mpi.engine.train import Trainer
from fedlora_mpi.experiment import parts
from fedlora_mpi.experiment.assembly import Assembly, build
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.federation.federation import State
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.models.quantized import QuantizedWeight
from fedlora_mpi.mpi.comm import Solo, connect
from fedlora_mpi.mpi.ending import run_or_abort

FULL = {
    "model": "resnet8",
    "clients": 40,
    "train": 500,
    "test": 100,
    "side": 32,
    "batch": 100,
    "epochs": 5,
}
QUICK = {
    "model": "cifar_resnet8",
    "clients": 4,
    "train": 20,
    "test": 5,
    "side": 8,
    "batch": 10,
    "epochs": 4,
}
METHODS = {
    "fedavg": {"name": "fedavg"},
    "fedlora": {
        "name": "fedlora",
        "lora_epochs": 2,
        "conv_rank": 0.6,
        "linear_rank": 4,
        "rank_rule": "official",
        "scale": "official",
    },
}
# factors on a backbone in 4 bits, for checks alone
TUNED = {"fedit": {"name": "fedit", "lora_ranks": [4], "merge": False}}
FOUR_BIT = {"name": "mlp", "hidden": 256, "layers": 3, "quantization": "nf4"}
TARGET = 1.0  # second per round of FedLoRA


class TimeIsUp(Exception):
    """No time is left for a measurement."""


class Clock:
    """The minutes that are left."""

    def __init__(self, minutes: float) -> None:
        self._end = time.perf_counter() + 60 * minutes

    def need(self, seconds: float = 5) -> float:
        """Seconds left; raises TimeIsUp when they are fewer than ``seconds``."""
        left = self._end - time.perf_counter()
        if left < seconds:
            raise TimeIsUp
        return left


def prepare(task: dict, method: str, comm=None, lr: float = 0.1, **engine) -> Assembly:
    """A built run of the cell."""
    clients = task["clients"]
    sides = {"train": clients * task["train"], "test": max(100, clients * task["test"])}
    images = {"size": task["side"], "channels": 3} | sides
    holds = {"kind": "iid", "clients": clients, "train": task["train"], "test": task["test"]}
    tree = {
        "data": {"dataset": "synthetic", "synthetic": images, "partition": holds},
        "model": task["model"],
        "algorithm": (METHODS | TUNED)[method],
        "rounds": 1,
        "engine": engine,
        "train": {"epochs": task["epochs"], "batch_size": task["batch"], "lr": lr, "momentum": 0.9},
    }
    return build(from_dict(tree, "gpu.py"), "gpu.py", comm or Solo())


@contextmanager
def data_made_once() -> Iterator[None]:
    """Runs of one task share their images: to draw them takes a second."""
    whole = parts.load
    parts.load = cache(whole)
    try:
        yield
    finally:
        parts.load = whole


def ends(built: Assembly, clients: int) -> dict[str, torch.Tensor]:
    """How far local training moves all trained leaves of the first clients, [clients, ...] on the
    host.

    Raises AssertionError if epochs should have been recorded and were not.
    """
    (client_type,) = built.federation.clients.types
    rows = {n: v.expand(clients, *v.shape).clone() for n, v in client_type.initial.personal.items()}
    shared = {n: v.to(client_type.trainer.device) for n, v in client_type.initial.shared.items()}
    trainer = client_type.trainer
    done = [
        {**d.end.shared, **d.end.personal} for d in trainer.train(range(clients), shared, rows, 0)
    ]
    if trainer.graphs is not None:
        assert trainer.graphs.recorded_epochs(), "asked for recordings, and nothing was recorded"
    first = {**client_type.initial.shared, **client_type.initial.personal}
    # statistics move far, whatever is trained
    trained = [n for n in first if client_type.trainer.model.role(n) != "stats"]
    return {n: torch.stack([tree[n].cpu() - first[n].cpu() for tree in done]) for n in trained}


def apart(a: dict, b: dict) -> float:
    """How far apart two trainings end, as a part of how far the second went."""

    def length(tree):
        return sum(float(v.double().square().sum()) for v in tree.values()) ** 0.5

    return length({n: a[n] - b[n] for n in b}) / length(b)


# Whether it is right


def checks(task: dict, device: str) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Pairs of a name and a check, which returns what it found or raises an error."""
    few = task | {"clients": 4, "epochs": 3, "train": min(200, task["train"])}
    loop, stack = {"path": "loop"}, {"path": "stack", "group_size": 4}
    steps, again = {"graphs": False}, {"graphs": True}
    for method in METHODS:

        @cache
        def made(on=device, method=method, **engine):
            return ends(prepare(few, method, lr=0.01, device=on, **engine), 4)

        def near(most, how, reference, made=made):
            return lambda: bounded(apart(made(**how), made(**reference)), most)

        yield f"{method}: loop against the CPU's", near(5e-2, loop | steps, loop | {"on": "cpu"})
        yield f"{method}: stack against loop", near(5e-2, stack | steps, loop | steps)
        by_products = stack | steps | {"convolutions": "products"}
        yield (
            f"{method}: stack by products against loop",
            near(5e-2, by_products, loop | steps),
        )
        streams = {"path": "streams", "group_size": 4}
        for name, path in (("stack", stack), ("loop", loop), ("streams", streams)):
            yield f"{method}: recorded {name} against steps", near(5e-2, path | again, path | steps)
        yield f"{method}: streams against loop", near(0, streams | again, loop | again)
        for precision, most in (("tf32", 0.2), ("bf16", 0.5)):
            for name, path in (("stack", stack), ("loop", loop)):
                how = path | {"precision": precision}
                yield f"{method}: {precision} {name} against float32", near(most, how, path | steps)
        if device == "cuda":
            yield (
                f"{method}: nothing waits for the GPU inside local training",
                partial(waits_not, few, method),
            )
            yield (
                f"{method}: a stack is split where memory is short",
                lambda method=method, made=made: split_check(few, method, made(**stack, **steps)),
            )
    yield "4-bit weights: the numbers are those on the CPU", partial(same_numbers, device)
    for name, engine in (
        ("loop", loop | steps),
        ("stack", stack | steps),
        ("recorded", loop | again),
    ):
        yield (
            f"4-bit weights: {name} against the CPU's loop",
            partial(four_bit, few, device, engine),
        )


def checked(task: dict, device: str) -> list[dict]:
    """A row of each check. One that fails is told with its traceback, and the others go on."""
    rows = []
    for name, check in checks(task, device):
        row: dict = {"check": name, "passed": False}
        try:
            row |= check() | {"passed": True}
        except Exception as error:
            traceback.print_exc()
            row["note"] = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"{'ok' if row['passed'] else 'FAILED'}: {name}", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def bounded(difference: float, most: float) -> dict:
    # also False for a NaN
    assert difference <= most, f"{difference:.3g} apart, at most {most:g} are right"
    return {"difference": difference, "at most": most}


def same_numbers(device: str) -> dict:
    weight = QuantizedWeight.of(torch.randn(256, 512), "nf4")
    assert torch.equal(weight.to(device).form().cpu(), weight.form())
    return {}


def four_bit(few: dict, device: str, engine: dict) -> dict:
    here, there = (
        ends(prepare(few | {"model": FOUR_BIT}, "fedit", lr=0.01, device=on, **how), 4)
        for on, how in ((device, engine), ("cpu", {"path": "loop", "graphs": False}))
    )
    return bounded(apart(here, there), 5e-2)


def waits_not(few: dict, method: str) -> dict:
    built = prepare(few, method, lr=0.01, device="cuda", path="stack", group_size=4, graphs=False)
    with unsynchronized():
        ends(built, 4)
    return {}


@contextmanager
def unsynchronized() -> Iterator[None]:
    """A wait for the GPU inside local training raises RuntimeError."""
    whole = Trainer._run_items

    def strict(*given):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return whole(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    Trainer._run_items = strict
    try:
        yield
    finally:
        Trainer._run_items = whole


def split_check(few: dict, method: str, stack: dict) -> dict:
    """A stack that finds the memory short is split, and ends where it would have."""
    built = prepare(few, method, lr=0.01, device="cuda", path="stack", group_size=4, graphs=False)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base, whole = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    ends(built, 4)
    peak = torch.cuda.max_memory_reserved()
    for share in (0.75, 0.6, 0.45, 0.3):  # of what it took; convolutions make do with less
        (client_type,) = built.federation.clients.types
        room = MemoryBudget()
        client_type = replace(client_type, trainer=replace(client_type.trainer, memory_budget=room))
        clients = replace(built.federation.clients, types=(client_type,))
        short = replace(built, federation=replace(built.federation, clients=clients))
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((base + share * (peak - base)) / whole)
        try:
            found = ends(short, 4)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        if room.max_clients is not None:
            note = f"split to {room.max_clients} in {share:.0%} of the memory"
            return bounded(apart(found, stack), 5e-2) | {"note": note}
    raise AssertionError("no limit of the memory split the stack")


# How fast it is


def rounds(built: Assembly, clock: Clock, repeats: int) -> dict:
    """Seconds of whole rounds: the first two, then the median of ``repeats``, by stages."""
    state, rows, seconds = initial_state(built), [], []
    while len(seconds) < 2 + repeats:
        if len(seconds) > 2:  # a part of the repeats says as much
            try:
                clock.need(2 * seconds[-1])
            except TimeIsUp:
                break
        begin = time.perf_counter()
        state, row, _ = run_round(built.federation, State(0, *state[1:]), evaluate=True, stop=False)
        rows.append(row)
        seconds.append(time.perf_counter() - begin)
        clock.need(0)

    def median(key):
        return statistics.median(row[key] for row in rows[2:])

    found = {"seconds": statistics.median(seconds[2:]), "first": seconds[0], "second": seconds[1]}
    found |= {stage: median(f"seconds_{stage}") for stage in ("train", "exchange", "evaluate")}
    found["TFLOP/s"] = rows[-1]["flops"] / found["seconds"] / 1e12
    if torch.cuda.is_available():
        found["peak GB"] = torch.cuda.max_memory_reserved() / 1e9
    return found


def ways(task: dict, device: str, quick: bool) -> dict[str, dict]:
    """The engine settings of each row; ``quick``: of some."""
    clients = task["clients"]
    stack = {"path": "stack", "group_size": clients // 2, "graphs": False}
    found = {
        f"stack of {clients // 2}, graphs": stack | {"graphs": True},
        f"stack of {clients // 2}": stack,
        f"stack of {clients // 2}, products, graphs": stack
        | {"graphs": True, "convolutions": "products"},
        "8 streams, graphs": {"path": "streams", "group_size": 8, "graphs": True},
        "loop, graphs": {"path": "loop", "graphs": True},
        "loop": {"path": "loop", "graphs": False},
        f"stack of {clients // 4}, graphs": stack
        | {"graphs": True, "group_size": max(1, clients // 4)},
        f"stack of {clients}, graphs": stack | {"graphs": True, "group_size": clients},
        "tf32, graphs": stack | {"graphs": True, "precision": "tf32"},
        "bf16, graphs": stack | {"graphs": True, "precision": "bf16"},
        "auto": {},
        "compiled, graphs": stack | {"compile": True, "graphs": True},
        "compiled": stack | {"compile": True},
    }
    left_out = (
        (
            "compiled",
            "loop, graphs",
            "8 streams",
            f"stack of {clients // 4}",
            f"stack of {clients},",
        )
        if quick
        else ()
    )
    # What matters most comes first, what compiles last.
    return {
        name: how | {"device": device}
        for name, how in found.items()
        if not name.startswith(left_out)
    }


def measured(name: str, method: str, measure: Callable[[], dict], plain: float) -> dict:
    """A row, of a failure its reason."""
    row = {"method": method, "way": name}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    print(f"measuring {method}: {name}", file=sys.stderr, flush=True)
    try:
        row |= measure()
        return row | {"against plain": plain / row["seconds"]} if "seconds" in row else row
    except TimeIsUp:
        return row | {"note": "no time was left"}
    except (RuntimeError, ValueError, subprocess.SubprocessError) as error:
        # the other rows are worth having
        return row | {"note": f"{type(error).__name__}: {error}".partition("\n")[0]}


def under_mpirun(asked, workers: int, method: str, clock: Clock, engine: dict) -> dict:
    """The seconds of ``workers`` ranks that share the device, and a server."""
    if shutil.which("mpirun") is None:
        return {"note": "there is no mpirun"}
    inside = json.dumps(
        {
            "method": method,
            "engine": engine | {"group_size": -(-task_of(asked)["clients"] // workers)},
        }
    )
    line = [
        *MPIRUN[:1],
        "-n",
        str(workers + 1),
        *MPIRUN[1:],
        sys.executable,
        __file__,
        "--inside",
        inside,
    ]
    line += ["--minutes", str(clock.need(20) / 60), "--repeats", str(asked.repeats)] + [
        "--quick"
    ] * asked.quick
    done = subprocess.run(line, capture_output=True, text=True, timeout=clock.need(20))
    if done.returncode:
        return {"note": (done.stderr.strip() or "mpirun failed").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def inside(asked) -> int:
    """One rank of ``under_mpirun``."""
    comm, what = connect(), json.loads(asked.inside)
    built = prepare(task_of(asked), what["method"], comm, **what["engine"])
    # all ranks do as many; the caller keeps the time
    found = rounds(built, Clock(asked.minutes + 60), asked.repeats)
    if comm.rank == 0:
        print(json.dumps(found), flush=True)
    return 0


def plain(task: dict, device: str, clock: Clock) -> dict:
    """Seconds of the loop that one would write by hand, over all clients."""
    built = prepare(task, "fedavg", device=device, path="loop", graphs=False)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def once(clients: list[int]) -> float:
        begin = time.perf_counter()
        bare_loop(built, clients)
        wait()
        return time.perf_counter() - begin

    once([0])
    clock.need(2 * task["clients"] * once([0]))
    return {"seconds": once(list(range(task["clients"])))}


def task_of(asked) -> dict:
    return QUICK if asked.quick else FULL


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a small task")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument(
        "--repeats", type=int, help="rounds of a row after the first two; 3, of a small task 1"
    )
    parser.add_argument("--inside", help="used by this program itself")
    asked = parser.parse_args()
    asked.repeats = asked.repeats or (1 if asked.quick else 3)
    if asked.inside:
        return run_or_abort(connect(), lambda: inside(asked))
    if asked.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu.py: torch sees no GPU here; --device cpu --quick tries the program out",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(1)
    with data_made_once():
        return examine(asked)


def examine(asked) -> int:
    """Check and measure; the exit code."""
    task, clock = task_of(asked), Clock(asked.minutes)
    found = checked(task, asked.device)
    begin = {"method": "fedavg", "way": "plain"} | plain(task, asked.device, clock)
    rows = [begin]
    both = [
        (method, *way)
        for method in ("fedlora", "fedavg")
        for way in ways(task, asked.device, asked.quick).items()
    ]
    for method, name, engine in both:
        if "compile" not in engine:

            def measure():
                return rounds(prepare(task, method, **engine), clock, asked.repeats)  # noqa: B023

            rows.append(
                measured(name, method, lambda: clock.need() and measure(), begin["seconds"])
            )  # noqa: B023
    for workers in (2,) if asked.quick else (2, 4):
        engine = {"device": asked.device, "path": "stack", "graphs": True}

        def share():
            return under_mpirun(asked, workers, "fedlora", clock, engine)  # noqa: B023

        rows.append(measured(f"{workers} ranks, stack, graphs", "fedlora", share, begin["seconds"]))
    for method, name, engine in both:
        if "compile" in engine:  # takes a minute, which no clock can cut short

            def measure():
                return rounds(prepare(task, method, **engine), clock, asked.repeats)  # noqa: B023

            rows.append(
                measured(name, method, lambda: clock.need(90) and measure(), begin["seconds"])
            )  # noqa: B023
    if best := min(
        (row["seconds"] for row in rows if row["method"] == "fedlora" and "seconds" in row),
        default=None,
    ):
        last = {
            "method": "fedlora",
            "way": f"best; to reach: {TARGET:g} s, 20 times",
            "seconds": best,
        }
        rows.append(last | {"against plain": begin["seconds"] / best})
    print(table(found), end="\n\n")
    tell(asked, rows)
    if asked.json:
        asked.json.write_text(
            json.dumps(json.loads(asked.json.read_text()) | {"checks": found}, indent=1) + "\n"
        )
    if asked.device == "cuda":
        print(f"on {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")
    failed = [row["check"] for row in found if not row["passed"]]
    if failed:
        print(f"gpu.py: {len(failed)} of {len(found)} checks failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
