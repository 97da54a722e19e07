"""Read the data sets that a config names: files of torchvision and of others, and made samples."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ..core.extras import extra_imports
from ..core.losses import Targets
from ..core.paths import expand_home
from ..core.seeds import rng
from ..core.vision import import_torchvision
from . import own
from .csv_texts import read_ag_news, read_csv
from .folders import read_folder, read_tiny_imagenet
from .leaf import read_leaf
from .samples import RawData, RawTexts, Samples, to_samples
from .source import Source
from .tables import read_tables


@contextmanager
def _explain_missing_files(source: Source, folder: str) -> Iterator[None]:
    """Turn an error of reading or downloading into a ValueError that names ``folder``."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        # RuntimeError comes from torchvision, OSError from the file system or the network.
        if source.download:
            why = str(error).splitlines()[0]
            raise ValueError(
                f"data.download = true: could not get {source.dataset} into {folder} ({why}); put "
                "the files there"
            ) from error
        raise ValueError(
            f"data.root = {source.root}: {source.dataset} is missing or damaged in {folder}; "
            f"put the files there or set data.download=true"
        ) from error


def _torchvision_reader(name: str, folder: str) -> Callable[[Source], RawData]:
    """Return a reader for a torchvision class.

    torchvision checks MD5 sums before it unpickles anything.
    """

    def read(source: Source) -> RawData:
        root = str(expand_home(source.root))
        dataset_class = getattr(import_torchvision().datasets, name)
        with _explain_missing_files(source, os.path.join(root, folder)):
            sides = [
                dataset_class(root, train=train, download=source.download)
                for train in (True, False)
            ]
        train, test = (to_samples(side.data, side.targets) for side in sides)
        return RawData(train, test, len(sides[0].classes), tuple(sides[0].classes))

    return read


def _tiny_imagenet(source: Source) -> RawData:
    root = str(expand_home(source.root))
    folder = os.path.join(root, "tiny-imagenet-200")
    with _explain_missing_files(source, folder):
        if source.download and not os.path.isdir(folder):
            import_torchvision().datasets.utils.download_and_extract_archive(
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                root,
                md5="90528d7ca1a48142e341f4ef8d21d0de",
            )
        return read_tiny_imagenet(folder)


def _digits(source: Source) -> RawData:
    """Return the 1797 digits of scikit-learn, with values 0..16 scaled to 0..240.

    The test set is a fixed fifth of each class.
    """
    with extra_imports("sklearn", "digits", "data.dataset = digits"):
        from sklearn.datasets import load_digits
    digits = load_digits()
    x, y = (digits.images * 15).astype(np.uint8), digits.target
    is_test = np.zeros(len(y), dtype=bool)
    for c in range(10):
        rows = np.flatnonzero(y == c)
        is_test[
            rows[torch.randperm(len(rows), generator=rng(1, "digits", c))[: round(len(rows) / 5)]]
        ] = True
    return RawData(to_samples(x[~is_test], y[~is_test]), to_samples(x[is_test], y[is_test]), 10)


def _synthetic(source: Source) -> RawData:
    """Return bytes 128 + 48 z, clipped to 0..255; z is a sample of the mixture at unit variance."""
    settings = source.synthetic
    shape = (settings.channels, settings.size, settings.size)
    prototypes = torch.randn(
        settings.classes, *shape, generator=rng(settings.seed, "synthetic", "prototypes")
    )

    def draw_side(name: str, number: int) -> Samples:
        y = torch.arange(number) % settings.classes
        z = prototypes[y] + settings.noise * torch.randn(
            number, *shape, generator=rng(settings.seed, "synthetic", name)
        )
        z = z / (1 + settings.noise**2) ** 0.5
        return Samples((128 + 48 * z).clamp(0, 255).to(torch.uint8), y)

    return RawData(
        draw_side("train", settings.train), draw_side("test", settings.test), settings.classes
    )


def _ag_news(source: Source) -> RawTexts:
    folder = os.path.join(str(expand_home(source.root)), "AG_NEWS")
    if source.download:
        with _explain_missing_files(source, folder):
            for name, md5 in _AG_NEWS_MD5.items():
                import_torchvision().datasets.utils.download_url(
                    f"{_AG_NEWS_URL}/{name}", folder, md5=md5
                )
    return read_ag_news(folder, source.text)


# torchtext's address and MD5 sums.
_AG_NEWS_URL = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv"
_AG_NEWS_MD5 = {
    "train.csv": "b1a00f826fdfbd249f79597b59e1dc12",
    "test.csv": "d52ea96a97a2d943681189a97654912d",
}


TEXT_READERS: dict[str, Callable[[Source], RawTexts]] = {
    "ag_news": _ag_news,
    "csv": lambda source: read_csv(str(expand_home(source.root)), source.text),
}
OWN_READERS: dict[str, Callable[[Source, Targets | None], own.OwnData]] = {
    "npz": lambda source, _: own.read_npz(str(source.path)),
    "leaf": lambda source, _: read_leaf(source.root),
    "table": lambda source, wanted: read_tables(
        str(expand_home(source.root)), source.table, wanted
    ),
}
READERS: dict[str, Callable[[Source], RawData]] = {
    "cifar10": _torchvision_reader("CIFAR10", "cifar-10-batches-py"),
    "cifar100": _torchvision_reader("CIFAR100", "cifar-100-python"),
    "fashionmnist": _torchvision_reader("FashionMNIST", "FashionMNIST/raw"),
    "mnist": _torchvision_reader("MNIST", "MNIST/raw"),
    "tiny_imagenet": _tiny_imagenet,
    "folder": lambda source: read_folder(source.root, source.image_size),
    "digits": _digits,
    "synthetic": _synthetic,
}
