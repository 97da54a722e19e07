"""Run folders made by hand: logs and checkpoints without training, and what damages them."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np

from fedlora_mpi.analysis.groups import RunLog, group_runs
from fedlora_mpi.store import checkpoint, seal
from fedlora_mpi.store.log import Log, pack_ragged

# --- logs of three clients, for what compares runs


def write_run(
    folder,
    *rows,
    seed=1,
    rounds=None,
    algorithm="fedavg",
    model="cnn",
    digest="x",
    extra_column=None,
    dataset="digits",
    **settings,
):
    """A run folder whose 3 clients had these accuracies, round by round. ``settings``: of the
    ``train`` block.
    """
    folder.mkdir(parents=True)
    algorithm = {"name": algorithm} if isinstance(algorithm, str) else algorithm
    config = {
        "seed": seed,
        "rounds": rounds or max(1, len(rows)),
        "output": str(folder),
        "data": {"dataset": dataset, "partition": {"kind": "iid", "seed": seed}},
        "model": {"name": model},
        "algorithm": algorithm,
        "train": {"lr": 0.1, **settings},
        "engine": {"group_size": 3},
    }
    counts = np.array([[4, 0], [1, 3], [0, 4]])
    index = [np.arange(4)] * 3
    partition = {
        "train_counts": counts,
        "test_counts": counts,
        "digest": digest,
        **pack_ragged("train", index),
        **pack_ragged("test", index),
    }
    log = Log.create(
        folder / "log.h5",
        config_yaml="",
        config_json=json.dumps(config),
        versions={},
        clients=3,
        partition=partition,
    )
    for round_, accuracies in enumerate(rows, 1):
        accuracies = np.array(accuracies, float)
        row = {
            "accuracy": np.nanmean(accuracies) if not np.isnan(accuracies).all() else np.nan,
            "train_loss": 1 / round_,
        }
        row |= {
            "clients": 3,
            "bytes_up": 3000,
            "bytes_down": 6000,
            "flops": 2e12,
            "drift": 0.5,
            "seconds_train": 1.5,
        }
        row |= {"seconds_exchange": 0.5} | ({extra_column: 7.0 * round_} if extra_column else {})
        log.append(round_, row, {"accuracy": accuracies, "loss": accuracies})
    log.close()
    return folder


def read_groups(*folders):
    return group_runs([RunLog.read(folder) for folder in folders])


def table_rows(table, kind="csv"):
    return list(csv.DictReader(getattr(table, kind)().splitlines()))


# --- a log and checkpoints of seven clients, for what stores them

CLIENTS = 7
ONE_WORKER = [[0, 1, 2, 3, 4, 5, 6]]
ODD_WORKERS = [[5, 0, 3], [], [6], [2, 4, 1]]


def all_personal_leaves(seed=0):
    """Leaves [N, ...] of all clients: odd names, a scalar per client, an empty leaf, integers."""
    rng = np.random.default_rng(seed)
    return {
        "layer2.0.conv1.weight.A": rng.standard_normal((CLIENTS, 3, 5), np.float32),
        "head/bias~1%b": rng.standard_normal((CLIENTS, 2)),
        "a.scale": rng.standard_normal(CLIENTS, np.float32),
        "nothing": np.zeros((CLIENTS, 0), np.float32),
        "steps": rng.integers(0, 9, (CLIENTS, 1)),
    }


SHARED = {
    "z.weight": np.arange(15, dtype=np.float32).reshape(3, 5).T,
    "a.count": np.array(3),
    "flag": np.array([True]),
}


def create_log(run):
    partition = {
        **pack_ragged("train", [np.arange(n, 2 * n) for n in range(CLIENTS)]),
        **pack_ragged("test", [np.array([n]) for n in range(CLIENTS)]),
        "train_counts": np.eye(CLIENTS, 3, dtype=np.int64),
        "digest": "cafe",
    }
    return Log.create(
        run / "log.h5",
        config_yaml="seed: 1\n",
        config_json='{"seed": 1}',
        versions={"numpy": np.__version__},
        clients=CLIENTS,
        partition=partition,
    )


def append_round(log, round_):
    log.append(
        round_,
        {"train_loss": 1 / (1 + round_), "seconds_train": 2.0, "bytes_up": 12, "accuracy": 0.5},
        {"accuracy": np.full(CLIENTS, round_, np.float32), "loss": np.nan},
    )


def save_checkpoint(
    run, round_, workers=ODD_WORKERS, personal=None, shared=SHARED, run_digest="mine"
):
    """Write and commit a checkpoint of ``personal`` [N, ...], spread over workers as listed."""
    personal = all_personal_leaves(round_) if personal is None else personal
    folder = checkpoint.begin(run, round_)
    shards = [
        checkpoint.write_clients(
            folder, worker, ids, {name: leaf[ids] for name, leaf in personal.items()}
        )
        for worker, ids in enumerate(workers)
    ]
    shards.append(
        checkpoint.write_server(
            folder, round_=round_, shared=shared, server={}, extra_attrs={"note": "x"}
        )
    )
    shards.append(checkpoint.copy_log(folder, run / "log.h5"))
    checkpoint.commit(folder, shards, run_digest=run_digest, clients=CLIENTS)
    return folder


# --- damage


def flip_bit(folder):
    content = bytearray((folder / "worker-0000.h5").read_bytes())
    content[len(content) // 2] ^= 4
    (folder / "worker-0000.h5").write_bytes(content)


def reseal(path: Path) -> None:
    """Make the seals of a log right again, as far as they can be: who changes a file can do that
    too.
    """
    try:
        with h5py.File(path, "r+") as file:
            columns = {
                f"{g}/{n}": d[()]
                for g in ("rounds", "clients", "ranks")
                for n, d in file[g].items()
            }
            file.attrs[seal.HEAD_SEAL] = seal.head_checksum(file)
            row_seals = seal.row_checksums(columns)
            del file[seal.ROW_SEALS]
            file.create_dataset(seal.ROW_SEALS, data=row_seals, maxshape=(None,), chunks=(256,))
    except Exception:  # what cannot be sealed is refused for another reason
        return
