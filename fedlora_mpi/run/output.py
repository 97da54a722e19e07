"""A run folder: what a new one holds, and whether a run may go on in an old one."""

import json
import os
import platform
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from .. import __version__
from .. import config as configs
from ..config import Config
from ..mpi.comm import Comm
from ..mpi.ending import collectively
from ..store import checkpoint
from ..store.files import StoreError, write_atomic
from ..store.log import Log, inventory_of, ragged
from ..store.run_folder import check
from ..store.sight import sees, token
from ..store.snapshot import Checkpoint
from .assembly import Assembly
from .fingerprint import KEPT, Inventory, computed, difference, kept, unlike


def recorded_config(folder: Path, overrides: Sequence[str]) -> Config:
    """The config of a run folder."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{folder}: not a run folder, it has no config.yaml; give the output of a run"
        )
    check(folder)
    return replace(configs.recorded(folder / "config.yaml", overrides), output=_as_output(folder))


def _as_output(folder: Path) -> str:
    """A folder as ``output`` names it; one called ``~x`` is nobody's home."""
    return str(folder.absolute() if str(folder).startswith("~") else folder)


def begun(folder: Path, comm: Comm) -> bool:
    """Whether the folder holds a run, as rank 0 sees it."""
    there = collectively(comm, lambda: comm.rank == 0 and (folder / "config.yaml").is_file())
    return comm.broadcast(b"1" if there else b"0") == b"1"


def continued(config: Config, source: str, folder: Path) -> Config:
    """``config`` with the engine's ``auto`` as the run in ``folder`` has decided it.

    Raises ValueError where that run had other settings.
    """
    recorded = recorded_config(folder, ())
    auto = [
        field.name
        for field in fields(config.engine)
        if getattr(config.engine, field.name) in ("auto", "measure")
    ]
    if config.engine.path == "measure":
        auto.append("compile")
    engine = replace(config.engine, **{name: getattr(recorded.engine, name) for name in auto})
    config = replace(config, engine=engine, output=_as_output(folder))
    if configs.digest(config) != configs.digest(recorded):
        was, now = configs.flat(recorded), configs.flat(config)
        key = next(
            k
            for k in was | now
            if was.get(k) != now.get(k) and not k.startswith(configs.FREE_ON_RESUME)
        )
        raise ValueError(
            f"{source}: {key} = {now.get(key)}: the run in {folder} has {was.get(key)}; choose "
            "another output"
        )
    return config


def need_shared(folder: Path, comm: Comm) -> None:
    """Raise Refused on all ranks when one of them does not see the run folder, or the one that it
    will be in, as rank 0 does, or may not write there. Leaves nothing behind. Raises StoreError,
    Unwritable.
    """
    if comm.size == 1:
        return
    seen = np.zeros(comm.size, np.int64)

    def tell() -> None:
        blind = np.flatnonzero(seen < 2).tolist()
        if comm.rank in blind:
            ranks = (
                f"rank{'s' * (len(blind) > 1)} {', '.join(map(str, blind))} (host "
                f"{socket.gethostname()})"
            )
            how = (
                f"{'may only read' if seen[comm.rank] else 'does not see'} {path.parent}, where "
                "rank 0 writes"
            )
            raise ValueError(
                f"output = {folder}: {ranks} {how}; give a folder that all nodes share"
            )

    with ExitStack() as stack:
        path = collectively(
            comm, lambda: stack.enter_context(token(folder)) if comm.rank == 0 else None
        )
        path = Path(os.fsdecode(comm.broadcast(os.fsencode(path or ""))))
        seen[comm.rank] = sees(path) and 1 + os.access(path.parent, os.W_OK)
        comm.sum(seen)  # each number is set by one rank
        collectively(comm, tell)


def same_as_begun(folder: Path, built: Assembly) -> None:
    """Raise ValueError when the run began with other data or another network than there are now; on
    a machine that may compute other last bits, say so in a line.
    """
    _same_words(folder, built)
    _same_weights(folder, built)
    was, now, began = _begun_with(folder), kept(built.inventory), "when the run began"
    of_config = (configs.digest(config) for config in (recorded_config(folder, ()), built.config))
    # a run of before there were inventories; ``newest`` tells of another config
    if not was or len({*of_config}) > 1:
        return
    moved = unlike(was["platform"], now["platform"], began)
    for kind in KEPT:
        if (
            kind != "platform"
            and was[kind] != now[kind]
            and not (moved and kind in computed(built.config))
        ):
            text = f"{folder}: {difference(kind, was[kind], now[kind], began)[1]}"
            root = f" in data.root = {built.config.data.source.root}" if kind == "data" else ""
            raise ValueError(f"{text}; put back what was{root}, or start anew with another output")
    if moved:
        line = (
            f"{folder}: {moved}: from here on bits may differ from those of this run on the "
            "machine it began on"
        )
        print(f"fedlora-mpi: {line}", file=sys.stderr, flush=True)


def _begun_with(folder: Path) -> Inventory:
    """The inventory in the log, or in that of the newest checkpoint where there is no log; {} where
    none has one.
    """
    homes = [
        folder,
        *(checkpoint.folder_of(folder, round_) for round_ in checkpoint.committed(folder)[-1:]),
    ]
    found = (inventory_of(home / "log.h5") for home in homes)
    return next((was for was in found if was.keys() >= {*KEPT}), {})


def _same_words(folder: Path, built: Assembly) -> None:
    """Raise ValueError when the run began with another vocabulary than its data have now."""
    kept, source = folder / "vocabulary.json", built.config.data.source
    if built.vocabulary and kept.is_file() and kept.read_bytes() != built.vocabulary.json.encode():
        if source.text.tokenizer:
            raise ValueError(
                f"{kept}: is not that of data.text.tokenizer = {source.text.tokenizer}, which has "
                "changed since the run began: put back what was, or start anew (if this copy is "
                "damaged, remove it)"
            )
        raise ValueError(
            f"{kept}: is not that of the training texts in data.root = {source.root}; they, or "
            "the library tokenizers, have changed since the run began: put back what was, or "
            "start anew (if this copy is damaged, remove it)"
        )


def _same_weights(folder: Path, built: Assembly) -> None:
    """Raise ValueError when the newest checkpoint began with other files of a network than there
    are now.
    """
    origins = [origin for network in built.config.model.mix for origin in network.origins]
    rounds = checkpoint.committed(folder)
    if not (origins and rounds):
        return
    try:
        found = Checkpoint.read(checkpoint.folder_of(folder, rounds[-1]))
    except StoreError:
        return  # ``newest`` tells of it
    first = -len(origins)  # their parts of a digest are the last
    was, now = (digest.split("-") for digest in (found.manifest.run_digest, built.digest))
    if was[:first] == now[:first] and was != now:
        changed = next(
            origin
            for origin, a, b in zip(origins, was[first:], now[first:], strict=False)
            if a != b
        )
        raise ValueError(
            f"{folder / 'config.yaml'}: model.{changed.key} = {changed.value}: has changed since "
            "the run began: put back what was, or start anew"
        )


def fill(folder: Path, built: Assembly) -> None:
    """What a new run folder holds: the resolved config and an empty log."""
    describe(folder, built)
    create_log(folder, built)


def describe(folder: Path, built: Assembly) -> None:
    """The resolved config, the layers of networks of Hugging Face and, for texts, the vocabulary."""
    for name, text in ({"config.yaml": configs.sealed_yaml(built.config)} | _beside(built)).items():
        write_atomic(folder / name, text.encode())


def _beside(built: Assembly) -> dict[str, str]:
    """The files that a run folder has for ``open_run``, by name."""
    found = {}
    for number, network in enumerate(built.config.model.mix):
        for described in (
            file for origin in network.origins for file in origin.files if file.suffix == ".json"
        ):
            found[f"network-{number}.json"] = described.read_text(encoding="utf-8")
    return found | ({"vocabulary.json": built.vocabulary.json} if built.vocabulary else {})


def create_log(folder: Path, built: Assembly) -> None:
    split = built.split
    Log.create(
        folder / "log.h5",
        config_yaml=configs.sealed_yaml(built.config),
        config_json=json.dumps(configs.resolved_dict(built.config)),
        versions=_versions(),
        clients=len(split.train),
        beside=_beside(built),
        inventory=json.dumps(kept(built.inventory)),
        partition={
            **ragged("train", split.train),
            **ragged("test", split.test),
            "train_counts": split.train_counts,
            "test_counts": split.test_counts,
            "input_shape": np.array(built.shape, np.int64),
            "input_tokens": np.array([built.vocabulary.size if built.vocabulary else 0], np.int64),
            "input_padding": np.array(
                [built.vocabulary.padding if built.vocabulary else 0], np.int64
            ),
            "digest": split.digest(),
        },
    ).close()


def _versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    found = {
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
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
