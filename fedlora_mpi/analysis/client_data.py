"""The samples of the clients of a run, as the run's networks read them."""

from pathlib import Path

import torch

from ..config import Config
from ..config.blocks import prefix_errors
from ..data.feed import Feed
from ..data.partition import Split
from ..data.samples import Samples
from ..experiment.output import check_data_unchanged
from ..experiment.parts import load_data


def load_feed(folder: Path, config: Config, split: Split, round_: int) -> Feed:
    """Return the samples of all clients of the run in ``folder``, on the CPU.

    round_: the finished round, from 1, whose task counts if ``data.tasks`` is set. Raises
    ValueError if the data set is missing or is not the one the run was trained on.
    """
    source = str(folder / "log.h5")
    data = load_data(config, source)
    check_data_unchanged(folder, config, data)
    if tasks := config.data.tasks:
        labels = data.train.y.numpy(), data.test.y.numpy()
        with prefix_errors(source, "data"):
            splits = tasks.split_by_task(split, *labels)
        split = splits[min((round_ - 1) // tasks.rounds, len(splits) - 1)]
    shift, cpu = config.data.source.shift, torch.device("cpu")
    return Feed(data, split, seed=config.seed, shift=shift, device=cpu, augment=False)


def client_test_samples(feed: Feed, client: int) -> Samples:
    """Return the client's test samples, in the order of the split."""
    batch = feed.test_batch([client], 0, feed.test_size(client))
    return Samples(batch.x[0], batch.y[0])


def client_train_samples(feed: Feed, client: int) -> Samples:
    """Return the client's training samples, in the order of the split, without augmentation."""
    batch = feed.unshuffled_batch([client], all_samples=True)
    return Samples(batch.x[0], batch.y[0])
