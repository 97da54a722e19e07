"""The checks. Each may raise; heavy imports stay inside, for they are part of what is checked."""

import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from ..core.paths import expand_home
from ..core.units import format_bytes
from ..mpi.launch import expected_ranks, find_mpirun, function_command, has_leftovers
from .finding import Case, Check, Finding, ended

LIBRARIES = ("torch", "torchvision", "numpy", "h5py", "mpi4py", "PyYAML")
_LITTLE = 10**9  # bytes free that a folder without a config should have


def _python(case: Case) -> Finding:
    found, wrong = {}, []
    try:
        required = "\n".join(metadata.requires("fedlora_mpi") or ())
        ranges = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", required, re.MULTILINE))
    except metadata.PackageNotFoundError:  # started from its source folder
        ranges = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        least = ranges.get(name.lower(), "0")
        if _numbers(found[name]) < _numbers(least):
            wrong.append(f"{name} {found[name]} is older than {least}")
    versions = ", ".join(f"{name} {number}" for name, number in found.items())
    if wrong:
        return Finding(
            "failure", ", ".join(wrong), f"pip install -c constraints.txt . in {sys.prefix}"
        )
    return Finding("ok", f"{sys.version.split()[0]} in {sys.prefix}; {versions}")


def _config(case: Case) -> Finding:
    return Finding("ok", f"{case.source}, run folder {case.folder}")


def recorded(case: Case) -> bool:
    """Whether the config is that of a run folder, which may have been moved."""
    return bool(case.source) and Path(case.source).parent == Path(case.folder)


def facts(case: Case) -> dict[str, Any]:
    """What a config says that the checks ask for. Raises ValueError."""
    from .. import config as configs

    read = (configs.recorded if recorded(case) else configs.read)(Path(case.source), case.overrides)
    folder = case.folder if recorded(case) else str(expand_home(read.output))
    return {
        "source": case.source,
        "folder": folder,
        "threads": read.engine.threads,
        "device": read.engine.device,
    }


def _launch(case: Case) -> Finding:
    launcher = find_mpirun()
    if launcher is None:
        return Finding(
            "failure",
            "no mpirun beside this Python or on PATH, so one process only",
            "pip install 'fedlora-mpi[mpi]' or module load openmpi",
        )
    code, out, err = ended(_ranks(launcher, "hello"), CHECKS["launch"].limit - 10)
    said = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if code is None:
        return Finding("failure", f"{launcher} -n 2 does not end", CHECKS["launch"].remedy)
    if code or len(said) != 2:
        cause = " ".join(err.split())[-300:]
        root = "allow-run-as-root" in err
        remedy = (
            "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1, or be another user"
        )
        text = f"{launcher} -n 2 ends with code {code}"
        if root:
            return Finding("failure", f"{text}; it refuses root", remedy)
        return Finding("failure", f"{text}: {cause}", CHECKS["launch"].remedy)
    if {each["sum"] for each in said} != {2}:
        return Finding(
            "failure",
            f"{launcher} starts 2 processes that do not find each other, with {said[0]['library']}",
            "mpirun and the library that mpi4py finds must be of the same MPI (MPI4PY_LIBMPI)",
        )
    cores = [each["cores"] for each in sorted(said, key=lambda each: each["rank"])]
    text = f"2 ranks by {launcher}, {said[0]['library']}, on cores {cores[0]} and {cores[1]}"
    if cores[0] == cores[1] and "-" not in cores[0]:
        return Finding("warning", text, "both are bound to one core; mpirun --bind-to none")
    return Finding("ok", text)


def _environment(case: Case) -> Finding:
    if has_leftovers():
        text = "PMIX_RANK or PMIX_NAMESPACE of a job that has ended; mpirun from here may crash"
        return Finding("warning", text, CHECKS["environment"].remedy)
    ranks, name = expected_ranks()
    if ranks > 1:
        return Finding(
            "warning",
            f"{name} = {ranks}: run and resume want to be started as so many ranks",
            f"mpirun -n {ranks} ... or srun --mpi=pmix (--mpi=none starts strangers); for one "
            f"process unset {name}",
        )
    return Finding("ok", "no variables of another MPI or Slurm job")


def _ulfm(case: Case) -> Finding:
    missing = (
        "a run ends when a worker dies, and resumes; Open MPI 5 or newer has ULFM: pip install "
        "'fedlora-mpi[mpi]'"
    )
    launcher = find_mpirun()
    if launcher is None:
        return Finding("warning", "no mpirun, so no ULFM", missing)
    _, out, _ = ended(_ranks(launcher, "lose_one", "--with-ft", "ulfm"), CHECKS["ULFM"].limit - 10)
    if "went on" not in out:
        return Finding(
            "warning", f"{launcher} --with-ft ulfm does not outlive a killed rank", missing
        )
    return Finding("ok", "a rank was killed, the other went on (mpirun --with-ft ulfm)")


def _gpus(case: Case) -> Finding:
    import torch

    smi = shutil.which("nvidia-smi")
    there = ended([smi, "-L"], 20)[1].count("UUID: GPU-") if smi else 0
    names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    for k in range(len(names)):
        assert torch.ones(3, device=f"cuda:{k}").sum().item() == 3
    if names:
        return Finding("ok", f"{', '.join(names)}; worker k of a node has GPU k mod {len(names)}")
    if case.device == "cuda":
        text = f"engine.device = cuda, and torch {torch.__version__} sees none of {there} GPUs"
        return Finding("failure", text, CHECKS["GPUs"].remedy)
    if there:
        return Finding(
            "warning",
            f"nvidia-smi lists {there}, torch {torch.__version__} sees none",
            CHECKS["GPUs"].remedy,
        )
    return Finding("ok", "none; workers compute on CPU cores")


def _threads(case: Case) -> Finding:
    cores, threads = len(os.sched_getaffinity(0)), case.threads
    if threads > cores:
        return Finding(
            "failure",
            f"engine.threads = {threads} on {cores} cores",
            "engine.threads=1, and a rank per core",
        )
    return Finding(
        "ok",
        f"{cores} of {os.cpu_count()} cores are open to this process; with engine.threads = "
        f"{threads} mpirun -n {cores // threads + 1} keeps them busy",
    )


def _round_trip(case: Case) -> Finding:
    import numpy as np

    from ..store import hdf5

    numbers = np.arange(15.0, dtype=np.float32).reshape(3, 5)
    with _scratch(case.folder) as folder:
        with hdf5.create(folder / "a.h5") as file:
            hdf5.write(file, "numbers", numbers)
        with hdf5.open_file(folder / "a.h5") as file:
            back = file["numbers"][...]
    assert np.array_equal(numbers, back), f"wrote {numbers}, read {back}"
    return Finding("ok", f"wrote, synced and read a file in {_there(case.folder)}")


def _locking(case: Case) -> Finding:
    from ..store.files import StoreError
    from ..store.lock import locked

    with _scratch(case.folder) as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with locked(folder):
            try:
                with locked(folder):
                    refused = False
            except StoreError:
                refused = True
    if said or not refused:
        return Finding(
            "warning",
            f"{_there(case.folder)} has no working locks",
            "never start two runs with one output",
        )
    return Finding("ok", f"a second run in one folder is refused in {_there(case.folder)}")


def _space(case: Case) -> Finding:
    free = shutil.disk_usage(_there(case.folder)).free
    if not case.source:
        level = "ok" if free >= _LITTLE else "warning"
        text = f"{format_bytes(free)} free in {_there(case.folder)}"
        return Finding(level, text, "" if level == "ok" else CHECKS["space"].remedy)
    from .. import config as configs
    from ..mpi.comm import Solo
    from ..plan import storage_bytes
    from ..run.assembly import build

    read = configs.read(case.source, case.overrides)
    need = storage_bytes(build(read, case.source, Solo()))
    level = "failure" if need > free else "warning" if 2 * need > free else "ok"
    text = f"{format_bytes(free)} free in {_there(case.folder)}, the run needs {format_bytes(need)}"
    return Finding(level, text, "" if level == "ok" else CHECKS["space"].remedy)


def _torchvision(case: Case) -> Finding:
    from ..core.vision import import_torchvision

    module = import_torchvision()
    assert module.models.resnet18, module.datasets.CIFAR10
    return Finding("ok", f"{module.__version__} imports; its models and data sets are there")


def _slurm(case: Case) -> Finding:
    sbatch, sinfo = shutil.which("sbatch"), shutil.which("sinfo")
    if not (sbatch and sinfo):
        return Finding(
            "warning",
            "no sbatch on PATH",
            "only `fedlora-mpi submit` and jobs/ want it; mpirun works without",
        )
    code, out, err = ended([sinfo, "--noheader", "--format=%P"], CHECKS["Slurm"].limit - 5)
    if code != 0:
        last = (err.strip().splitlines() or ["no answer"])[-1]
        return Finding(
            "warning", f"{sbatch} is there, its controller is not: {last}", CHECKS["Slurm"].remedy
        )
    return Finding("ok", f"{sbatch}; partitions {' '.join(out.split())}")


CHECKS = {
    "Python": Check(_python, "pip install -c constraints.txt . in a new virtual environment"),
    "config": Check(_config, "correct the config; `fedlora-mpi plan` checks it too"),
    "environment": Check(
        _environment, "open a new shell, or unset the variables that `env | grep PMI` lists"
    ),
    "launch": Check(
        _launch, "`mpirun -n 2 hostname` must work first; one core needs --oversubscribe"
    ),
    "GPUs": Check(
        _gpus,
        "look at nvidia-smi and CUDA_VISIBLE_DEVICES; install a torch built for CUDA, or "
        "engine.device=cpu",
    ),
    "threads": Check(_threads, "engine.threads=1"),
    "HDF5": Check(_round_trip, "choose another output=..., on a file system that can be written"),
    "locks": Check(_locking, "choose another output=..., on a file system that can be written"),
    "space": Check(_space, "free some, choose another output=..., or checkpoint.keep=1", 300),
    "torchvision": Check(
        _torchvision, "pip install the torchvision that belongs to this torch (constraints.txt)"
    ),
    "Slurm": Check(_slurm, "`sinfo` must work; ask the cluster's support", 15),
    "ULFM": Check(_ulfm, "pip install 'fedlora-mpi[mpi]'"),
}


def _ranks(launcher: str, name: str, *options: str) -> list[str]:
    return [launcher, *options, "-n", "2", *function_command(f"{__package__}.mpi_probe", name)]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _there(folder: str) -> Path:
    """The folder, or what of the way to it exists."""
    path = Path(folder).absolute()
    return next(at for at in (path, *path.parents) if at.exists())


@contextmanager
def _scratch(folder: str) -> Iterator[Path]:
    """A folder for a moment where the run's would be."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=_there(folder)) as made:
        yield Path(made)
