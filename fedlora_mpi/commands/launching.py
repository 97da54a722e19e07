"""``--ranks`` of ``run`` and ``resume``: the same command on several ranks of this machine."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import Config
    from ..mpi.comm import Comm


def check_ranks(args: argparse.Namespace, comm: "Comm") -> None:
    """Raise Refusal on all ranks if ``--ranks`` is not the number that was launched."""
    from ..mpi import local_ranks
    from ..mpi.ending import collectively

    if args.ranks is not None:
        collectively(comm, lambda: local_ranks.check_ranks(args.ranks, comm.size))


def read_or_refuse(args: argparse.Namespace, read: Callable[[], "Config"]) -> "Config":
    """Return the config that ``read()`` gives, if ``--ranks`` is a number of ranks.

    A mistake is told here, before any rank starts. Raises Refusal.
    """
    from ..mpi import local_ranks
    from ..mpi.comm import Solo
    from ..mpi.ending import collectively

    def check_and_read() -> "Config":
        local_ranks.check_ranks(args.ranks, None)
        return read()

    return collectively(Solo(), check_and_read)


def launch_training(
    args: argparse.Namespace, arguments: Sequence[str], config: "Config", folder: Path
) -> int:
    """Run the command ``arguments`` on ``args.ranks`` ranks and return the exit code.

    One rank is this process. Raises Refusal if there is no launcher.
    """
    from ..experiment.stopping import lost_rounds_of
    from ..mpi import local_ranks
    from ..mpi.comm import Solo
    from ..mpi.ending import collectively

    if args.ranks == 1:
        return args.command.execute(args, Solo())
    code = collectively(
        Solo(), lambda: local_ranks.run_ranks(args.ranks, arguments, config.faults.tolerate)
    )
    if code == local_ranks.INTERRUPTED_EXIT and (line := lost_rounds_of(folder, config.rounds)):
        print(f"fedlora-mpi: {line}", file=sys.stderr, flush=True)
    return code
