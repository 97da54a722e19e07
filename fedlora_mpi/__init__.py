"""Federated learning with shared and personal low-rank parts, simulated over MPI.

``run(config)`` trains from a config and ``resume(path)`` goes on with a run; ``open_run(path)``
reads a run folder, ``open_runs(pattern)`` several. ``fedlora-mpi --help`` lists the commands. A
user's own method imports all that it needs from here: ``Algorithm``, ``Variables`` and the other
names below. A function that returns data may return ``OwnData``.
"""

__version__ = "0.1.0"

# name -> its module, imported at first use, so that reading a run needs no torch
_HOME = {
    "run": "api.training",
    "resume": "api.training",
    "open_run": "analysis.run_view",
    "open_runs": "analysis.runs",
    "sweep": "sweeps.sweep",
    **dict.fromkeys(
        (
            "Aggregate",
            "Algorithm",
            "LocalTraining",
            "Mix",
            "Phase",
            "Reports",
            "Step",
            "Term",
            "Transport",
            "Update",
            "Upload",
            "Variables",
            "Visit",
        ),
        "algorithm",
    ),
    **dict.fromkeys(("Batch", "cross_entropy"), "core.batch"),
    "bounded": "core.bounds",
    "rng": "core.seeds",
    **dict.fromkeys(("Tree", "split", "sq_dist", "tmap"), "core.tree"),
    "Model": "models.network",
    "OwnData": "data.own",
}
_FORMER = dict.fromkeys(("Offer", "Train", "Vars"), "algorithm")  # former names, still accepted
__all__ = [*_HOME]  # noqa: PLE0604


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str):
    if home := _HOME.get(name) or _FORMER.get(name):
        # Not at the top: ``python -m fedlora_mpi`` would look for it in the working folder first.
        from importlib import import_module

        return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
