"""``fedlora-mpi``: the command line. The commands are in ``commands/``."""
# PYTHON_ARGCOMPLETE_OK: a shell with argcomplete's global completion looks for this mark

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress

from . import __version__
from .commands import COMMANDS

EXAMPLES = """examples:
  fedlora-mpi run configs/quickstart.yaml                     one process, no MPI needed
  fedlora-mpi run configs/cifar10.yaml --ranks 3              rank 0 is the server, 2 workers; by mpirun
  mpirun -n 3 fedlora-mpi run configs/cifar10.yaml            the same, by hand
  fedlora-mpi run configs/cifar10.yaml algorithm=fedavg output=runs/fedavg train.lr=0.05
  fedlora-mpi run configs/cifar10.yaml --overwrite            anew, in the place of the run that is there
  fedlora-mpi run configs/cifar10.yaml --ranks 5 faults.tolerate=true   outlives a dead worker
  fedlora-mpi resume runs/cifar10                             go on after Ctrl-C or a kill
  mpirun -n 5 fedlora-mpi resume runs/cifar10 rounds=400      for more rounds, on any number of ranks
  fedlora-mpi sweep configs/cifar10.yaml train.lr=0.01,0.05 seed=1,2,3 --jobs 2   all six runs; again: those that are left
  fedlora-mpi config configs/cifar10.yaml train.lr=0.05       every setting and where it comes from
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
  fedlora-mpi check held_per:HeldPer                          is a method of your own right?
  fedlora-mpi export runs/a --client 7 --to adapter-7         its low-rank part, for Hugging Face's peft
  fedlora-mpi export runs/a --client 7 --to model.pt          its own model, a state dict; without --client what all share
  fedlora-mpi export runs/a --to results.h5                   rs_test_acc and rs_train_loss, as PFLlib keeps them
  fedlora-mpi partition configs/cifar10.yaml --to pfllib out  the split as a folder that PFLlib reads
  fedlora-mpi digest runs/a runs/b                            are two runs equal to the last bit?
  fedlora-mpi status runs/a || echo "rounds are left"         is it done? mpirun ends with 0, too, when a node was lost"""  # noqa: E501
_EXIT_CODES = """exit codes: 0 done, 1 a fault, 2 a mistake in what was asked, 75 stopped at a round boundary (SIGUSR1 or
Ctrl-C) with a checkpoint written, 130 stopped at once (a second Ctrl-C), 141 nobody reads the output."""  # noqa: E501
_MPI_START_TIMEOUT = 300.0  # seconds that MPI may take to start
_BUSY_ALLOWANCE = 20.0  # seconds added on a busy machine


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    from .core.streams import SIGPIPE_EXIT, OutputError, repair_streams, tolerate_output_errors

    try:
        with repair_streams():
            args = _parse_arguments(arguments)
            with tolerate_output_errors() if args.command.trains else nullcontext():
                return _execute(args)
    except BrokenPipeError:
        return SIGPIPE_EXIT
    except OutputError as error:
        print(f"fedlora-mpi: {error}", file=sys.stderr)
        return 1


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed arguments. Overrides may stand between and after the options."""
    parser = _build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for the words that may follow
        import argcomplete

        argcomplete.autocomplete(parser)
    args, unrecognized = parser.parse_known_args(arguments)
    if unrecognized and not (
        hasattr(args, "overrides") and all("=" in text and text[0] != "-" for text in unrecognized)
    ):
        parser.error(f"unrecognized arguments: {' '.join(unrecognized)}")
    if unrecognized:
        args.overrides = [*args.overrides, *unrecognized]
    return args


def _execute(args: argparse.Namespace) -> int:
    """Run one command and return the exit code."""
    if args.command.imports and os.getcwd() not in sys.path:
        # after all libraries, so that no file of the user shadows one
        sys.path.append(os.getcwd())
    from .mpi.comm import Solo, connect
    from .mpi.ending import run_or_abort
    from .mpi.launch import is_launched, limit_startup

    launch = args.command.launch
    if launch is not None and args.ranks is not None and not is_launched():
        return run_or_abort(Solo(), lambda: launch(args))
    parallel = args.command.parallel
    try:
        with limit_startup(_start_timeout(args)) if parallel and is_launched() else nullcontext():
            comm = connect() if parallel else Solo()
    except ValueError as error:
        print(f"fedlora-mpi: {error}", file=sys.stderr)
        return 2
    return run_or_abort(comm, lambda: args.command.execute(args, comm))


def _start_timeout(args: argparse.Namespace) -> float:
    """Return the seconds that MPI may take to start; 0: no limit.

    They follow from ``faults.timeout`` on the command line, because no config has been read yet.
    """
    timeouts = [
        text.partition("=")[2] for text in args.overrides if text.startswith("faults.timeout=")
    ]
    with suppress(ValueError):
        seconds = float(timeouts[-1]) if timeouts else _MPI_START_TIMEOUT
        return seconds and _BUSY_ALLOWANCE + seconds
    return _MPI_START_TIMEOUT


def _examples_of(name: str) -> str:
    """Return the examples of one command, and the exit codes."""
    heading, *lines = EXAMPLES.splitlines()
    own = [line for line in lines if f"fedlora-mpi {name} " in line]
    return "\n".join([heading, *own, "", _EXIT_CODES])


def _build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with a subparser for each command."""
    formatter = argparse.RawDescriptionHelpFormatter
    description = "Simulate personalised federated learning with low-rank parts, over MPI."
    parser = argparse.ArgumentParser(
        prog="fedlora-mpi",
        description=description,
        epilog=f"{EXAMPLES}\n\n{_EXIT_CODES}",
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"fedlora-mpi {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.help,
            description=command.help,
            epilog=_examples_of(name),
            formatter_class=formatter,
        )
        subparser.set_defaults(command=command)
        command.add_arguments(subparser)
    return parser
