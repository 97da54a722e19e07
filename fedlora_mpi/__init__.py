"""Federated learning with shared and personal low-rank parts, simulated over MPI.

``open_run(path)`` reads a run folder, ``open_runs(pattern)`` several; ``fedlora-mpi --help`` lists
the commands. A method of your own imports all that it needs from here: ``Algorithm``, ``Variables``
and the others below.
"""

__version__ = "0.1.0"

# name -> its module, which is imported when the name is asked for: reading a run needs no torch
_HOME = {
    "open_run": "analysis.run_view",
    "open_runs": "analysis.runs",
    **dict.fromkeys(
        ("Algorithm", "Cohort", "LocalTraining", "Mix", "Phase", "Step", "Variables"), "algorithm"
    ),
    **dict.fromkeys(("Batch", "cross_entropy"), "core.batch"),
    "bounded": "core.bounds",
    "rng": "core.seeds",
    **dict.fromkeys(("Tree", "split", "sq_dist", "tmap"), "core.tree"),
    "Model": "models.network",
}
_FORMER = ("Offer", "Train", "Vars")  # former names in ``algorithm``, still read
__all__ = [*_HOME]  # noqa: PLE0604


def __getattr__(name: str):
    if name in _HOME or name in _FORMER:
        # Not above: ``python -m fedlora_mpi`` looks for it in the working folder first.
        from importlib import import_module

        return getattr(import_module(f".{_HOME.get(name, 'algorithm')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
