"""The content of a new run folder, and the checks before a run continues in an old one."""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from .. import config as configs
from ..aggregation.topology import MixingMatrix
from ..config import Config
from ..data.datasets import Data
from ..mpi.comm import Comm
from ..mpi.ending import collectively
from ..store import checkpoint
from ..store.files import StoreError, write_atomic
from ..store.log import Log, pack_ragged, read_inventory
from ..store.run_folder import check_run_folder
from ..store.sight import create_probe, wait_for_file
from ..store.snapshot import Checkpoint
from ..store.sweep_folder import refuse_sweep
from .agreement import describe_ranks
from .assembly import Assembly
from .fingerprint import (
    RECORDED_KINDS,
    Inventory,
    data_digests,
    describe_difference,
    describe_platforms,
    local_platform,
    platform_dependent_kinds,
    recorded_inventory,
)

_REFERENCE = "when the run began"
_FORMER_LEAF = re.compile(r"shared \.(svd\.(round|numbers)$|turn\.round$|last\.|told\.)")


def recorded_config(folder: Path, overrides: Sequence[str]) -> Config:
    """Return the config of a run folder. Raises ValueError if ``folder`` is none."""
    if not (folder / "config.yaml").is_file():
        refuse_sweep(folder)
        raise ValueError(
            f"{folder}: not a run folder, it has no config.yaml; give the output of a run"
        )
    check_run_folder(folder)
    return replace(
        configs.read_recorded(folder / "config.yaml", overrides), output=_output_setting(folder)
    )


def _output_setting(folder: Path) -> str:
    """Return the value of ``output`` for a folder.

    A name that begins with ``~`` becomes absolute, so that it is not read as a home folder.
    """
    return str(folder.absolute() if str(folder).startswith("~") else folder)


def run_exists(folder: Path, comm: Comm) -> bool:
    """Return whether the folder contains a run, as rank 0 sees it."""
    exists = collectively(comm, lambda: comm.rank == 0 and (folder / "config.yaml").is_file())
    return comm.broadcast(b"1" if exists else b"0") == b"1"


def adopt_recorded_engine(config: Config, source: str, folder: Path) -> Config:
    """Return ``config`` with the engine settings that the run in ``folder`` has chosen.

    They replace the values ``auto`` and ``measure``. Raises ValueError if that run has other
    settings.
    """
    recorded = recorded_config(folder, ())
    undecided = [
        field.name
        for field in fields(config.engine)
        if getattr(config.engine, field.name) in ("auto", "measure")
    ]
    if config.engine.path == "measure":
        undecided.append("compile")
    engine = replace(config.engine, **{name: getattr(recorded.engine, name) for name in undecided})
    config = replace(config, engine=engine, output=_output_setting(folder))
    if change := _find_change(recorded, config):
        key, value, recorded_value = change
        raise ValueError(
            f"{source}: {key} = {value}: the run in {folder} has {recorded_value}; choose another "
            "output"
        )
    return config


def _find_change(recorded: Config, config: Config) -> tuple[str, Any, Any] | None:
    """Return the first key that differs and that a resume may not change, its value in ``config``
    and that in ``recorded``; None if there is none.
    """
    if configs.digest(config) == configs.digest(recorded):
        return None
    old, new = configs.all_settings(recorded), configs.all_settings(config)
    key = next(
        key
        for key in old | new
        if old.get(key) != new.get(key) and not key.startswith(configs.FREE_ON_RESUME)
    )
    return key, new.get(key), old.get(key)


def config_to_resume(folder: Path, overrides: Sequence[str]) -> Config:
    """Return the config of a run folder with overrides that a resume may make.

    Raises ValueError if ``folder`` is none, or if an override changes another key.
    """
    config = recorded_config(folder, overrides)
    recorded = recorded_config(folder, ())
    if change := _find_change(recorded, config):
        key, value, recorded_value = change
        raise ValueError(
            f"command line: {key} = {value}: the run in {folder} has {recorded_value}, and a "
            f"resume may change only {', '.join(configs.FREE_ON_RESUME)}; start anew with "
            f"'fedlora-mpi run {folder / 'config.yaml'} {shlex.join(overrides)} output=...'"
        )
    return config


def check_shared_folder(folder: Path, comm: Comm) -> None:
    """Raise Refusal on all ranks unless all see the run folder (or its parent) and may write there.

    Also raises Refusal or Fault on all ranks if rank 0 cannot write a test file. No file is left
    behind.
    """
    if comm.size == 1:
        return
    access = np.zeros(comm.size, np.int64)

    def report_blind_ranks() -> None:
        blind_ranks = np.flatnonzero(access < 2).tolist()
        if comm.rank in blind_ranks:
            ranks = describe_ranks(blind_ranks)
            limitation = (
                f"{'may only read' if access[comm.rank] else 'does not see'} {path.parent}, where "
                "rank 0 writes"
            )
            raise ValueError(
                f"output = {folder}: {ranks} {limitation}; give a folder that all nodes share"
            )

    with ExitStack() as stack:
        probe = collectively(
            comm, lambda: stack.enter_context(create_probe(folder)) if comm.rank == 0 else None
        )
        path = Path(os.fsdecode(comm.broadcast(os.fsencode(probe or ""))))
        access[comm.rank] = wait_for_file(path) and 1 + os.access(path.parent, os.W_OK)
        comm.sum(access)  # each number is set by one rank
        collectively(comm, report_blind_ranks)


def check_unchanged(folder: Path, assembly: Assembly) -> None:
    """Raise ValueError if the data or the network have changed since the run began.

    Prints a line if the last bits may differ on this machine.
    """
    assert assembly.inventory is not None  # ``build`` sets it
    _check_vocabulary(folder, assembly)
    _check_weight_files(folder, assembly)
    recorded, current = _recorded_inventory(folder), recorded_inventory(assembly.inventory)
    config_digests = (
        configs.digest(config) for config in (recorded_config(folder, ()), assembly.config)
    )
    # an older run has no inventory; ``find_newest`` reports another config
    if not recorded or len({*config_digests}) > 1:
        return
    recorded = _without_former_leaves(recorded, current)
    platform_change = describe_platforms(recorded["platform"], current["platform"], _REFERENCE)
    for kind in (*RECORDED_KINDS, "topology"):
        if (
            kind != "platform"
            and recorded.get(kind) != current.get(kind)
            and not (platform_change and kind in platform_dependent_kinds(assembly.config))
        ):
            raise _change(folder, assembly.config, kind, recorded, current)
    if platform_change:
        line = (
            f"{folder}: {platform_change}: from here on bits may differ from those of this run on "
            "the machine it began on"
        )
        print(f"fedlora-mpi: {line}", file=sys.stderr, flush=True)


def check_data_unchanged(folder: Path, config: Config, data: Data) -> None:
    """Raise ValueError if ``data`` are not those that the run in ``folder`` began with.

    Nothing is compared for an older run, which did not record its data, and for data that another
    machine computes with other last bits.
    """
    recorded = _recorded_inventory(folder)
    current: Inventory = {"data": data_digests(data)}
    if not recorded or recorded["data"] == current["data"]:
        return
    if recorded["platform"] == local_platform() or "data" not in platform_dependent_kinds(config):
        raise _change(folder, config, "data", recorded, current)


def _change(
    folder: Path, config: Config, kind: str, recorded: Inventory, current: Inventory
) -> ValueError:
    """The error for what has changed since the run began, and how to go on."""
    reference = f"{_REFERENCE} (log.h5)"  # the file that is damaged, if nothing has changed
    text = f"{folder}: {describe_difference(kind, recorded[kind], current[kind], reference)[1]}"
    places = {"data": f" in data.{config.data.source.place}", "topology": " in topology.path"}
    place = places.get(kind, "")
    return ValueError(f"{text}; put back what was{place}, or start anew with another output")


def _without_former_leaves(recorded: Inventory, current: Inventory) -> Inventory:
    """``recorded`` without the counters and figures that earlier versions kept among the shared
    leaves. If it has any, the common digest of the first variables cannot be compared.
    """
    kept = {n: v for n, v in recorded["structure"].items() if not _FORMER_LEAF.match(n)}
    if len(kept) == len(recorded["structure"]):
        return recorded
    return {**recorded, "structure": kept, "variables": current["variables"]}


def _recorded_inventory(folder: Path) -> Inventory:
    """Return the inventory in the log, or else in that of the newest checkpoint, or else {}."""
    folders = [
        folder,
        *(
            checkpoint.checkpoint_folder(folder, round_)
            for round_ in checkpoint.committed_rounds(folder)[-1:]
        ),
    ]
    inventories = (read_inventory(log_folder / "log.h5") for log_folder in folders)
    return next(
        (inventory for inventory in inventories if inventory.keys() >= {*RECORDED_KINDS}), {}
    )


def _check_vocabulary(folder: Path, assembly: Assembly) -> None:
    """Raise ValueError if the run began with another vocabulary than that of its data now."""
    stored_vocabulary, source = folder / "vocabulary.json", assembly.config.data.source
    if (
        assembly.vocabulary
        and stored_vocabulary.is_file()
        and stored_vocabulary.read_bytes() != assembly.vocabulary.json.encode()
    ):
        if source.text.tokenizer:
            raise ValueError(
                f"{stored_vocabulary}: is not that of data.text.tokenizer = "
                f"{source.text.tokenizer}, which has changed since the run began: put back what "
                "was, or start anew (if this copy is damaged, remove it)"
            )
        raise ValueError(
            f"{stored_vocabulary}: is not that of the training texts in data.root = {source.root}; "
            "they, or the library tokenizers, have changed since the run began: put back what "
            "was, or start anew (if this copy is damaged, remove it)"
        )


def _check_weight_files(folder: Path, assembly: Assembly) -> None:
    """Raise ValueError if the newest checkpoint began with other weight files."""
    origins = [origin for network in assembly.config.model.mix for origin in network.origins]
    rounds = checkpoint.committed_rounds(folder)
    if not (origins and rounds):
        return
    try:
        snapshot = Checkpoint.read(checkpoint.checkpoint_folder(folder, rounds[-1]))
    except StoreError:
        return  # ``find_newest`` reports it
    first_part = -len(origins)  # the weight files are the last parts of a digest
    recorded_parts, current_parts = (
        digest.split("-") for digest in (snapshot.manifest.run_digest, assembly.run_digest)
    )
    if (
        recorded_parts[:first_part] == current_parts[:first_part]
        and recorded_parts != current_parts
    ):
        changed = next(
            origin
            for origin, a, b in zip(
                origins, recorded_parts[first_part:], current_parts[first_part:], strict=False
            )
            if a != b
        )
        raise ValueError(
            f"{folder / 'config.yaml'}: model.{changed.key} = {changed.value}: has changed since "
            "the run began: put back what was, or start anew"
        )


def fill_run_folder(folder: Path, assembly: Assembly) -> None:
    """Write the content of a new run folder: descriptions and an empty log."""
    write_descriptions(folder, assembly)
    create_log(folder, assembly)


def write_descriptions(folder: Path, assembly: Assembly) -> None:
    """Write the files that describe a run.

    They are the resolved config, the config of each Hugging Face network and the vocabulary of
    texts.
    """
    for name, text in (
        {"config.yaml": configs.checksummed_yaml(assembly.config)} | _companion_texts(assembly)
    ).items():
        write_atomic(folder / name, text.encode())


def _companion_texts(assembly: Assembly) -> dict[str, str]:
    """Return the files that ``open_run`` needs in a run folder, by name."""
    texts = {}
    for number, network in enumerate(assembly.config.model.mix):
        for config_file in (
            file
            for origin in network.origins
            for file in origin.files
            if origin.key == "folder" and file.suffix == ".json"
        ):
            texts[f"network-{number}.json"] = config_file.read_text(encoding="utf-8")
    return texts | ({"vocabulary.json": assembly.vocabulary.json} if assembly.vocabulary else {})


def create_log(folder: Path, assembly: Assembly) -> None:
    assert assembly.inventory is not None  # ``build`` sets it
    split = assembly.split
    outputs = {"outputs": np.array([assembly.outputs], np.int64)}
    matrix = assembly.federation.matrix
    Log.create(
        folder / "log.h5",
        config_yaml=configs.checksummed_yaml(assembly.config),
        config_json=json.dumps(configs.resolved_dict(assembly.config)),
        versions=_library_versions(),
        clients=len(split.train),
        file_texts=_companion_texts(assembly),
        inventory=json.dumps(recorded_inventory(assembly.inventory)),
        partition={
            **pack_ragged("train", split.train),
            **pack_ragged("test", split.test),
            "train_counts": split.train_counts,
            "test_counts": split.test_counts,
            "input_shape": np.array(assembly.input_shape, np.int64),
            "input_tokens": np.array(assembly.token_settings[:1], np.int64),
            "input_padding": np.array(assembly.token_settings[1:], np.int64),
            # a network has one output for each class, except if the targets are no classes
            **(outputs if assembly.outputs != split.train_counts.shape[1] else {}),
            **(pack_ragged("neighbours", _neighbour_lists(matrix)) if matrix else {}),
            "digest": split.digest(),
        },
        spectral_gap=matrix.spectral_gap if matrix else None,
    ).close()


def _neighbour_lists(matrix: MixingMatrix) -> list[np.ndarray]:
    """The neighbours of each client, in ascending order."""
    return [np.array(sorted(neighbours), np.int64) for neighbours in matrix.neighbours]


def _library_versions() -> dict[str, str]:
    """Return the versions on which a result may depend."""
    versions = {
        "fedlora_mpi": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for name in (
        "numpy",
        "mpi4py",
        "h5py",
        "torchvision",
        "tokenizers",
        "transformers",
        "dp-accounting",
    ):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions
