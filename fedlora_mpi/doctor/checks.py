"""The checks of ``doctor``. Each may raise.

Heavy imports are inside the checks, because the imports are checked as well.
"""

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
from .finding import Check, Finding, Setup, run_command

REQUIRED_LIBRARIES = ("torch", "torchvision", "numpy", "h5py", "mpi4py", "PyYAML")
_MIN_FREE_BYTES = 10**9  # free bytes that are enough if no config is given


def _check_python(setup: Setup) -> Finding:
    versions_by_name, problems = {}, []
    try:
        required = "\n".join(metadata.requires("fedlora_mpi") or ())
        ranges = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", required, re.MULTILINE))
    except metadata.PackageNotFoundError:  # not installed: started from its source folder
        ranges = {}
    for name in REQUIRED_LIBRARIES:
        try:
            versions_by_name[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is missing")
            continue
        minimum = ranges.get(name.lower(), "0")
        if _version_numbers(versions_by_name[name]) < _version_numbers(minimum):
            problems.append(f"{name} {versions_by_name[name]} is older than {minimum}")
    versions = ", ".join(f"{name} {number}" for name, number in versions_by_name.items())
    if problems:
        return Finding(
            "failure", ", ".join(problems), f"pip install -c constraints.txt . in {sys.prefix}"
        )
    return Finding("ok", f"{sys.version.split()[0]} in {sys.prefix}; {versions}")


def _check_config(setup: Setup) -> Finding:
    return Finding("ok", f"{setup.source}, run folder {setup.folder}")


def is_run_config(setup: Setup) -> bool:
    """Return whether the config belongs to a run folder, which may have been moved."""
    return bool(setup.source) and Path(setup.source).parent == Path(setup.folder)


def read_config_values(setup: Setup) -> dict[str, Any]:
    """Return the values of the config that the checks need. Raises ValueError."""
    from .. import config as configs

    config = (configs.read_recorded if is_run_config(setup) else configs.read)(
        Path(setup.source), setup.overrides
    )
    folder = setup.folder if is_run_config(setup) else str(expand_home(config.output))
    return {
        "source": setup.source,
        "folder": folder,
        "threads": config.engine.threads,
        "device": config.engine.device,
    }


def _check_launch(setup: Setup) -> Finding:
    launcher = find_mpirun()
    if launcher is None:
        return Finding(
            "failure",
            "no mpirun beside this Python or on PATH, so one process only",
            "pip install 'fedlora-mpi[mpi]' or module load openmpi",
        )
    code, out, err = run_command(_rank_command(launcher, "hello"), CHECKS["launch"].limit - 10)
    answers = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if code is None:
        return Finding("failure", f"{launcher} -n 2 does not end", CHECKS["launch"].remedy)
    if code or len(answers) != 2:
        cause = " ".join(err.split())[-300:]
        refuses_root = "allow-run-as-root" in err
        remedy = (
            "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1, or be another "
            "user; `fedlora-mpi run --ranks` works as it is"
        )
        text = f"{launcher} -n 2 ends with code {code}"
        if refuses_root:
            return Finding("failure", f"{text}; it refuses root", remedy)
        return Finding("failure", f"{text}: {cause}", CHECKS["launch"].remedy)
    if {answer["sum"] for answer in answers} != {2}:
        return Finding(
            "failure",
            f"{launcher} starts 2 processes that do not find each other, with "
            f"{answers[0]['library']}",
            "mpirun and the library that mpi4py finds must be of the same MPI (MPI4PY_LIBMPI)",
        )
    cores = [each["cores"] for each in sorted(answers, key=lambda each: each["rank"])]
    text = f"2 ranks by {launcher}, {answers[0]['library']}, on cores {cores[0]} and {cores[1]}"
    if cores[0] == cores[1] and "-" not in cores[0]:
        return Finding("warning", text, "both are bound to one core; mpirun --bind-to none")
    return Finding("ok", text)


def _check_environment(setup: Setup) -> Finding:
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


def _check_ulfm(setup: Setup) -> Finding:
    remedy = (
        "a run ends when a worker dies, and resumes; Open MPI 5 or newer has ULFM: pip install "
        "'fedlora-mpi[mpi]'"
    )
    launcher = find_mpirun()
    if launcher is None:
        return Finding("warning", "no mpirun, so no ULFM", remedy)
    _, out, _ = run_command(
        _rank_command(launcher, "lose_one", "--with-ft", "ulfm"), CHECKS["ULFM"].limit - 10
    )
    if "went on" not in out:
        return Finding(
            "warning", f"{launcher} --with-ft ulfm does not outlive a killed rank", remedy
        )
    return Finding("ok", "a rank was killed, the other went on (mpirun --with-ft ulfm)")


def _check_gpus(setup: Setup) -> Finding:
    import torch

    smi = shutil.which("nvidia-smi")
    gpu_count = run_command([smi, "-L"], 20)[1].count("UUID: GPU-") if smi else 0
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    for k in range(len(names)):
        assert torch.ones(3, device=f"cuda:{k}").sum().item() == 3
    if names:
        return Finding("ok", f"{', '.join(names)}; worker k of a node has GPU k mod {len(names)}")
    if setup.device == "cuda":
        text = f"engine.device = cuda, and torch {torch.__version__} sees none of {gpu_count} GPUs"
        return Finding("failure", text, CHECKS["GPUs"].remedy)
    if gpu_count:
        return Finding(
            "warning",
            f"nvidia-smi lists {gpu_count}, torch {torch.__version__} sees none",
            CHECKS["GPUs"].remedy,
        )
    return Finding("ok", "none; workers compute on CPU cores")


def _check_threads(setup: Setup) -> Finding:
    from ..engine.half import multiplies_bfloat16

    cores, threads = len(os.sched_getaffinity(0)), setup.threads
    if threads > cores:
        return Finding(
            "failure",
            f"engine.threads = {threads} on {cores} cores",
            "engine.threads=1, and a rank per core",
        )
    return Finding(
        "ok",
        f"{cores} of {os.cpu_count()} cores are open to this process"
        + (
            f"; with engine.threads = {threads} --ranks {cores // threads + 1} keeps them busy"
            if find_mpirun()
            else ""
        )
        + (
            "; they multiply bfloat16 (engine.precision=bf16 may train faster)"
            if multiplies_bfloat16()
            else ""
        ),
    )


def _check_hdf5(setup: Setup) -> Finding:
    import numpy as np

    from ..store import hdf5

    numbers = np.arange(15.0, dtype=np.float32).reshape(3, 5)
    with _scratch_folder(setup.folder) as folder:
        with hdf5.create_file(folder / "a.h5") as file:
            hdf5.write(file, "numbers", numbers)
        with hdf5.open_file(folder / "a.h5") as file:
            read_back = file["numbers"][...]
    assert np.array_equal(numbers, read_back), f"wrote {numbers}, read {read_back}"
    return Finding("ok", f"wrote, synced and read a file in {_existing_folder(setup.folder)}")


def _check_locks(setup: Setup) -> Finding:
    from ..store.files import StoreError
    from ..store.lock import hold_lock

    with _scratch_folder(setup.folder) as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with hold_lock(folder):
            try:
                with hold_lock(folder):
                    is_refused = False
            except StoreError:
                is_refused = True
    if caught or not is_refused:
        return Finding(
            "warning",
            f"{_existing_folder(setup.folder)} has no working locks",
            "never start two runs with one output",
        )
    return Finding(
        "ok", f"a second run in one folder is refused in {_existing_folder(setup.folder)}"
    )


def _check_build(setup: Setup) -> Finding:
    return Finding("ok", "the data are there; partition, networks and method can be built")


def build_values(setup: Setup) -> dict[str, Any]:
    """Build the parts of the run, and return what later checks need. Raises ValueError."""
    from .. import config as configs
    from ..experiment.assembly import build
    from ..mpi.comm import Solo
    from ..plan import storage_bytes

    config = configs.read(setup.source, setup.overrides)
    return {"need": storage_bytes(build(config, setup.source, Solo()))}


def _check_space(setup: Setup) -> Finding:
    free = shutil.disk_usage(_existing_folder(setup.folder)).free
    text = f"{format_bytes(free)} free in {_existing_folder(setup.folder)}"
    if setup.need is None:
        level = "ok" if free >= _MIN_FREE_BYTES else "warning"
    else:
        level = "failure" if setup.need > free else "warning" if 2 * setup.need > free else "ok"
        text += f", the run needs {format_bytes(setup.need)}"
    return Finding(level, text, "" if level == "ok" else CHECKS["space"].remedy)


# Checks of a config, which also find values for the checks after them.
FINDERS = {"config": read_config_values, "build": build_values}


def _check_torchvision(setup: Setup) -> Finding:
    from ..core.vision import import_torchvision

    module = import_torchvision()
    assert module.models.resnet18, module.datasets.CIFAR10
    return Finding("ok", f"{module.__version__} imports; its models and data sets are there")


def _check_slurm(setup: Setup) -> Finding:
    sbatch, sinfo = shutil.which("sbatch"), shutil.which("sinfo")
    if not (sbatch and sinfo):
        return Finding(
            "warning",
            "no sbatch on PATH",
            "only `fedlora-mpi submit` and jobs/ want it; mpirun works without",
        )
    code, out, err = run_command([sinfo, "--noheader", "--format=%P"], CHECKS["Slurm"].limit - 5)
    if code != 0:
        last_line = (err.strip().splitlines() or ["no answer"])[-1]
        return Finding(
            "warning",
            f"{sbatch} is there, its controller is not: {last_line}",
            CHECKS["Slurm"].remedy,
        )
    return Finding("ok", f"{sbatch}; partitions {' '.join(out.split())}")


CHECKS = {
    "Python": Check(_check_python, "pip install -c constraints.txt . in a new virtual environment"),
    "config": Check(_check_config, "correct the config; `fedlora-mpi plan` checks it too"),
    "environment": Check(
        _check_environment, "open a new shell, or unset the variables that `env | grep PMI` lists"
    ),
    "launch": Check(
        _check_launch, "`mpirun -n 2 hostname` must work first; one core needs --oversubscribe"
    ),
    "GPUs": Check(
        _check_gpus,
        "look at nvidia-smi and CUDA_VISIBLE_DEVICES; install a torch built for CUDA, or "
        "engine.device=cpu",
    ),
    "threads": Check(_check_threads, "engine.threads=1"),
    "HDF5": Check(_check_hdf5, "choose another output=..., on a file system that can be written"),
    "locks": Check(_check_locks, "choose another output=..., on a file system that can be written"),
    "build": Check(_check_build, "correct the config, or get the data", 300),
    "space": Check(_check_space, "free some, choose another output=..., or checkpoint.keep=1"),
    "torchvision": Check(
        _check_torchvision,
        "pip install the torchvision that belongs to this torch (constraints.txt)",
    ),
    "Slurm": Check(_check_slurm, "`sinfo` must work; ask the cluster's support", 15),
    "ULFM": Check(_check_ulfm, "pip install 'fedlora-mpi[mpi]'"),
}


def _rank_command(launcher: str, name: str, *options: str) -> list[str]:
    return [launcher, *options, "-n", "2", *function_command(f"{__package__}.mpi_probe", name)]


def _version_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _existing_folder(folder: str) -> Path:
    """Return the folder, or its nearest parent that exists."""
    path = Path(folder).absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


@contextmanager
def _scratch_folder(folder: str) -> Iterator[Path]:
    """Yield a temporary folder on the file system of the run folder."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=_existing_folder(folder)) as scratch:
        yield Path(scratch)
