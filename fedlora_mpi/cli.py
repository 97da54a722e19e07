"""The commands."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from . import __version__

EXAMPLES = """examples:
  fedlora-mpi run configs/quickstart.yaml                     one process, no MPI needed
  mpirun -n 3 fedlora-mpi run configs/cifar10.yaml            rank 0 is the server, 2 workers
  fedlora-mpi run configs/cifar10.yaml algorithm=fedavg output=runs/fedavg train.lr=0.05
  mpirun -n 5 fedlora-mpi resume runs/cifar10                 go on, on any number of ranks
  mpirun --with-ft ulfm -n 5 fedlora-mpi run configs/cifar10.yaml faults.tolerate=true   outlives a dead worker
  fedlora-mpi plan configs/cifar10.yaml --ranks 5             what it would cost; trains nothing
  fedlora-mpi plan configs/cifar10.yaml --ranks 64 --gpus h200 --bandwidth 25e9   and on a cluster that is not here
  fedlora-mpi partition configs/cifar10.yaml                  who gets which data
  fedlora-mpi report runs/*                                   accuracy of runs
  fedlora-mpi report runs/* -o page                           page/report.html, its figures and tables for a paper
  fedlora-mpi watch runs/cifar10                              curve, time left and load of the ranks while it runs
  fedlora-mpi reproduce table1 --alpha 0.1 --jobs 2           the paper's table, shrunk to half an hour
  fedlora-mpi reproduce table1 --scale full --print-jobs      its runs as lines and as a Slurm array
  fedlora-mpi reproduce pfedlora --jobs 2                     clients with networks of their own: accuracy and cost
  fedlora-mpi reproduce fedhl --data cifar10 --jobs 2         LoRA of clients' own ranks on a backbone made here
  fedlora-mpi pretrain configs/cifar10.yaml --to net.safetensors   a backbone for model.weights=net.safetensors
  fedlora-mpi submit configs/cifar10.yaml --gpus 4            as a Slurm job that requeues itself until done
  fedlora-mpi doctor configs/cifar10.yaml                     does everything work on this machine?
  fedlora-mpi export runs/a --client 7 --to adapter-7         its low-rank part, for Hugging Face's peft
  fedlora-mpi export runs/a --client 7 --to model.pt          its own model, a state dict; without --client what all share
  fedlora-mpi export runs/a --to results.h5                   rs_test_acc and rs_train_loss, as PFLlib keeps them
  fedlora-mpi partition configs/cifar10.yaml --to pfllib out  the split as a folder that PFLlib reads
  fedlora-mpi digest runs/a runs/b                            are two runs equal to the last bit?
  fedlora-mpi status runs/a || echo "rounds are left"         is it done? mpirun ends with 0, too, when a node was lost

exit codes: 0 done, 1 a fault, 2 a mistake in what was asked, 75 stopped at a round boundary (SIGUSR1)
with a checkpoint written, 141 nobody
reads the output."""
_OF_COMMANDS = ("command", "parallel", "trains", "imports")  # what every parser sets
_START = 300.0  # seconds that MPI may take to start
_BUSY = 20.0  # seconds of these on a machine that has much else to do
OVERRIDES = "settings of the config by their dotted names, for instance train.lr=0.05 algorithm=fedavg"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    from .core.streams import UNREAD, Unprintable, unread_allowed, usable_streams

    try:
        with usable_streams():
            asked = _parse(arguments)
            with unread_allowed() if asked.trains else nullcontext():
                return _play(asked)
    except BrokenPipeError:
        return UNREAD
    except Unprintable as error:
        print(f"fedlora-mpi: {error}", file=sys.stderr)
        return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked; overrides may stand between and behind the options."""
    parser = _parser()
    asked, left = parser.parse_known_args(arguments)
    if left and not (hasattr(asked, "overrides") and all("=" in text and text[0] != "-" for text in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        asked.overrides = [*asked.overrides, *left]
    return asked


def _play(asked: argparse.Namespace) -> int:
    """Carry out one command; returns the exit code."""
    if asked.imports and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # behind all libraries: a file of the user's takes the place of none
    from .mpi.comm import Solo, connect
    from .mpi.ending import guarded
    from .mpi.launch import is_launched, starting

    try:
        with starting(_patience(asked)) if asked.parallel and is_launched() else nullcontext():
            comm = connect() if asked.parallel else Solo()
    except ValueError as error:
        print(f"fedlora-mpi: {error}", file=sys.stderr)
        return 2
    return guarded(comm, lambda: asked.command(asked, comm))


def _patience(asked: argparse.Namespace) -> float:
    """Seconds that MPI may take to start, 0: for ever; by ``faults.timeout`` on the command line, for no config is read."""
    given = [text.partition("=")[2] for text in asked.overrides if text.startswith("faults.timeout=")]
    with suppress(ValueError):
        seconds = float(given[-1]) if given else _START
        return seconds and _BUSY + seconds
    return _START


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedlora-mpi",
        description="Simulate personalised federated learning with low-rank parts, over MPI.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fedlora-mpi {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        name: str, command: Callable, help_: str, parallel: bool = False, trains: bool = False, imports: bool = True
    ) -> argparse.ArgumentParser:
        """parallel: under mpirun, too; trains: goes on when nobody reads its output; imports: a config's own classes."""
        sub = commands.add_parser(name, help=help_, description=help_, epilog=EXAMPLES, formatter_class=parser.formatter_class)
        sub.set_defaults(command=command, parallel=parallel, trains=trains, imports=imports)
        return sub

    training, reading = {"parallel": True, "trains": True}, {"imports": False}

    run = add("run", _run, "Train from a config into a new run folder.", **training)
    resume = add("resume", _resume, "Continue a run from its newest valid checkpoint.", **training)
    plan = add("plan", _plan, "Parameters, bytes, memory and time of a config; trains nothing.")
    partition = add("partition", _partition, "Who gets which data: a table, and a picture as PNG.")
    report = add("report", _report, "The accuracy of runs as a table; with -o a page of figures and tables, self-contained.", **reading)
    watch = add("watch", _watch, "A run in the terminal while it goes on: curve, time left, load of the ranks.", **reading)
    status = add("status", _status, "Whether a run is done: exit code 0, or 75 where rounds are left. For scripts.")
    digest = add("digest", _digest, "SHA-256 of the newest checkpoint of runs: equal means equal to the bit.", **reading)
    export = add("export", _export, "A run for others: a client's model (.pt, .safetensors), its adapter for peft (a folder), results for PFLlib (.h5).", **reading)
    doctor = add("doctor", _doctor, "Whether everything works on this machine, a line each with the remedy.")
    _backbone_of(add("pretrain", _pretrain, "Train a network on all data in one place, into a file for model.weights.", **training))
    _job_of(add("submit", _submit, "Queue a run as a Slurm job, which is queued again until the run is done."))
    _grid_of(add("reproduce", _reproduce, "A table of the FedLoRA paper, pFedLoRA's or FedHL's, from runs of our own, beside its numbers.", trains=True))
    for sub in (run, plan, partition):
        sub.add_argument("config", help="a YAML file")
    status.add_argument("target", type=Path, metavar="CONFIG|RUN", help="a YAML file, whose output is asked for, or a run folder")
    run.add_argument("--resume", action="store_true", help="go on with the run folder if it is there")
    doctor.add_argument("target", nargs="?", type=Path, metavar="CONFIG|RUN", help="default: this folder")
    for sub in (resume, export, watch):
        sub.add_argument("run", type=Path, help="a run folder")
    own = "its number, from 0; without, a file .pt or .safetensors has what all share"
    export.add_argument("--client", type=int, metavar="K", help=own)
    kinds = "NAME.pt, NAME.safetensors: a state dict; NAME.h5: accuracy and loss by round, as PFLlib keeps them; any other: a folder for peft"
    export.add_argument("--to", type=Path, required=True, metavar="NAME", help=kinds)
    for sub in (run, resume, plan, partition, doctor, status):
        sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    watch.add_argument("--every", type=float, default=2, metavar="SECONDS", help="between two looks (default 2)")
    watch.add_argument("--once", action="store_true", help="print it once and leave")
    plan.add_argument("--ranks", type=int, default=1, help="how many ranks mpirun would start (default 1)")
    plan.add_argument("--gpus", metavar="NAME|none", help="elsewhere: a GPU for each worker, such as h200, or a core like these")
    plan.add_argument("--bandwidth", type=float, metavar="BYTES/S", help="of a message there (default 12.5e9 with --gpus)")
    plan.add_argument("--latency", type=float, metavar="SECONDS", help="of a message there (default 5e-6 with --gpus)")
    partition.add_argument("-o", "--picture", type=Path, help="the PNG (default: CONFIG's name in this folder)")
    folder = "write it into a new folder that PFLlib reads"
    partition.add_argument("--to", nargs=2, metavar=("pfllib", "FOLDER"), help=folder)
    for sub in (report, digest):
        sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    page = "write report.html there, figures as PNG and PDF, tables as CSV, Markdown and LaTeX"
    report.add_argument("-o", "--output", type=Path, metavar="DIR", help=page)
    return parser


def _backbone_of(sub: argparse.ArgumentParser) -> None:
    """The arguments of ``pretrain``."""
    sub.add_argument("config", help="a YAML file; its partition and its algorithm do not matter")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    sub.add_argument("--to", type=Path, required=True, metavar="FILE.safetensors", help="where the weights go")
    sub.add_argument("--classes", metavar="0-4|0,2,5", help="only samples of these (default: all)")
    sub.add_argument("--epochs", type=int, metavar="E", help="default: train.epochs")
    sub.add_argument("--network", type=int, default=0, metavar="K", help="of model.mix, from 0 (default 0)")


def _job_of(sub: argparse.ArgumentParser) -> None:
    """The arguments of ``submit``."""
    sub.add_argument("config", help="a YAML file")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    sub.add_argument("--nodes", type=int, help="default 1")
    sub.add_argument("--ranks", type=int, help="of the job (default: server and a worker per GPU; 9 on a node without)")
    sub.add_argument("--gpus", type=int, metavar="G", help="per node (default 0)")
    sub.add_argument("--time", metavar="HH:MM:SS", help="until it is queued again (default 12:00:00)")
    sub.add_argument("--partition", help="default: the cluster's")
    sub.add_argument("--account", help="default: yours")
    sub.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")


def _grid_of(sub: argparse.ArgumentParser) -> None:
    """The arguments of ``reproduce``."""
    several = {"nargs": "+", "default": ()}
    sub.add_argument("table", choices=(*(f"table{n}" for n in range(1, 7)), "fig4", "fig6", "fig7", "pfedlora", "fedhl"))
    sets = ("cifar10", "cifar100", "tiny_imagenet", "ag_news")
    sub.add_argument("--data", **several, choices=sets, help="default cifar10, of table6 ag_news, of fedhl both")
    split = "of the Dirichlet split (default 0.1, of table6 1.0, of fedhl 0.5); not for pfedlora"
    sub.add_argument("--alpha", **several, type=float, help=split)
    texts = "table6 and fedhl: the file of the training texts in DATA/AG_NEWS (default train.csv)"
    sub.add_argument("--text-train", default="", metavar="FILE", help=texts)
    sub.add_argument("--seeds", **several, type=int, metavar="SEED", help="default: 1 2 3, at small scale 1")
    sub.add_argument("--rounds", type=int, help="default: the scale's; more of them go on with a finished run")
    sub.add_argument("--methods", **several, metavar="ROW", help="rows of the table; for table1, table6 and pfedlora any algorithm")
    crowds = "pfedlora: how many there are; all, 20 or 10 %% take part (default: all three, at small scale 10)"
    sub.add_argument("--clients", **several, type=int, choices=(10, 50, 100), help=crowds)
    sub.add_argument("--homogeneous", action="store_true", help="pfedlora: CNN-1 for every client, and FedAvg as well")
    sub.add_argument("--width", **several, choices=("narrow", "wide"), help="fedhl: of the network (default both)")
    part = "fedhl: fraction of the clients in a round (default 1.0 0.4)"
    sub.add_argument("--participation", **several, type=float, metavar="P", help=part)
    reached = "pfedlora: count rounds, bytes and FLOPs up to so many %% (default: what all methods reach)"
    sub.add_argument("--target", **several, type=float, metavar="PERCENT", help=reached)
    sub.add_argument("--scale", choices=("small", "full"), default="small", help="full is the paper's experiment")
    sub.add_argument("--jobs", type=int, metavar="J", help="runs at a time (default: one per core, or per GPU)")
    sub.add_argument("--ranks", type=int, default=1, metavar="R", help="MPI processes of a run (default 1)")
    sub.add_argument("--root", default="~/data", metavar="DATA", help="where the data sets are (default ~/data)")
    sub.add_argument("--download", action="store_true", help="fetch a data set that is not there")
    sub.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: runs/reproduce-SCALE")
    sub.add_argument("--print-jobs", action="store_true", help="run nothing; a line per run, and a Slurm array")
    sub.add_argument("--collect", action="store_true", help="run nothing; the table of what is done")


def _run(asked: argparse.Namespace, comm) -> int:
    from . import config
    from .run import loop as run

    begin = run.start_or_resume if asked.resume else run.start
    settings, comm = run.receive(comm, lambda: config.read(asked.config, asked.overrides))
    return begin(settings, asked.config, comm)


def _resume(asked: argparse.Namespace, comm) -> int:
    from .run.loop import resume

    return resume(asked.run, asked.overrides, comm)


def _plan(asked: argparse.Namespace, comm) -> int:
    from .config import read
    from .core.escapes import lines
    from .mpi.ending import together
    from .plan import plan

    there = asked.gpus, asked.bandwidth, asked.latency
    print(lines(together(comm, lambda: plan(read(asked.config, asked.overrides), asked.config, asked.ranks, *there))))
    return 0


def _pretrain(asked: argparse.Namespace, comm) -> int:
    from .config import read
    from .mpi.ending import together
    from .run.pretrain import pretrain

    named = ("to", "classes", "epochs", "network")
    given = {name: value for name, value in vars(asked).items() if name in named}
    together(comm, lambda: pretrain(read(asked.config, asked.overrides), asked.config, comm.size, **given))
    return 0


def _partition(asked: argparse.Namespace, comm) -> int:
    from .analysis.partition_table import draw, table
    from .analysis.pfllib_export import write_folder
    from .config import read
    from .core.escapes import lines, one_line
    from .mpi.ending import together
    from .run.assembly import load_data, split_data, tell_hints

    def show() -> None:
        config = read(asked.config, asked.overrides)
        if asked.to and asked.to[0] != "pfllib":
            raise ValueError(f"--to {asked.to[0]}: is no format; there is pfllib")
        data = load_data(config, asked.config)
        tell_hints(data, asked.config)
        split = split_data(config, asked.config, data)
        if asked.to:
            print(one_line(write_folder(config, data, split, Path(asked.to[1]))))
            return
        picture = asked.picture or Path(f"partition-{Path(asked.config).stem}.png")
        print(lines(table(split, data.names)))
        draw(split, picture, data.names)
        print(f"\npicture: {one_line(picture)}")

    together(comm, show)
    return 0


def _report(asked: argparse.Namespace, comm) -> int:
    from .core.escapes import one_line
    from .mpi.ending import together

    def tell() -> str:
        if asked.output:
            from .analysis.page.write import write

            return one_line(write(asked.runs, asked.output))
        from .analysis.report import table

        return table(asked.runs)

    print(together(comm, tell))
    return 0


def _watch(asked: argparse.Namespace, comm) -> int:
    from .analysis.watch import watch
    from .mpi.ending import together

    together(comm, lambda: watch(asked.run, asked.every, asked.once))
    return 0


def _status(asked: argparse.Namespace, comm) -> int:
    from .analysis.status import rounds_of
    from .core.escapes import one_line
    from .mpi.ending import together
    from .run.loop import STOPPED

    folder, saved, rounds = together(comm, lambda: rounds_of(asked.target, asked.overrides))
    print(one_line(f"{folder}: {'done' if saved >= rounds else f'{saved} of {rounds} rounds'}"))
    return 0 if saved >= rounds else STOPPED


def _export(asked: argparse.Namespace, comm) -> int:
    from .analysis.export import export
    from .analysis.run_view import open_run
    from .core.escapes import one_line
    from .mpi.ending import together

    print(one_line(together(comm, lambda: export(open_run(asked.run), asked.client, asked.to))))
    return 0


def _reproduce(asked: argparse.Namespace, comm) -> int:
    from .mpi.ending import together
    from .reproduce.carrying_out import reproduce
    from .reproduce.request import Request

    given = {name: value for name, value in vars(asked).items() if name not in _OF_COMMANDS}
    return together(comm, lambda: reproduce(Request(**given)))


def _submit(asked: argparse.Namespace, comm) -> int:
    from .mpi.ending import together
    from .run.slurm import submit

    given = {name: value for name, value in vars(asked).items() if name not in (*_OF_COMMANDS, "config")}
    print(together(comm, lambda: submit(asked.config, **given)))
    return 0


def _doctor(asked: argparse.Namespace, comm) -> int:
    from .doctor.examination import examine
    from .mpi.ending import together

    return together(comm, lambda: examine(asked.target, asked.overrides))


def _digest(asked: argparse.Namespace, comm) -> int:
    from .core.escapes import one_line
    from .mpi.ending import together
    from .store.reader import RunFiles

    def show() -> None:
        for folder in asked.runs:
            found = RunFiles(folder).checkpoint()
            sums = found.digest()
            print(f"{one_line(folder)} round {found.round} shared {sums['shared']} personal {sums['personal']}", flush=True)

    together(comm, show)
    return 0
