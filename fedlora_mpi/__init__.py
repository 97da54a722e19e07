"""Federated learning with shared and personal low-rank parts, simulated over MPI.

``open_run(path)`` reads a run folder, ``open_runs(pattern)`` several; ``fedlora-mpi --help`` lists the commands.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "open_run":  # imported late: pandas and h5py are not needed to train
        from .analysis.run_view import open_run

        return open_run
    if name == "open_runs":
        from .analysis.runs import open_runs

        return open_runs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
