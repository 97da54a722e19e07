"""Load a data set into memory.

Images are bytes, with their normalisation and training augmentation. Texts are token ids. A
user's own data may also be floats of any shape.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.bounds import bounded
from ..core.losses import Targets
from ..core.paths import check_path, expand_home
from ..core.seeds import rng
from ..core.vision import import_torchvision
from . import own, pfllib
from .csv_texts import read_ag_news, read_csv
from .folders import read_folder, read_tiny_imagenet
from .language import (
    Language,
    LanguageTexts,
    language_samples,
    number_clients,
    read_language,
)
from .leaf import read_leaf
from .own_checks import check
from .samples import RawData, RawTexts, Samples, to_samples
from .tables import Table, read_tables
from .texts import Text, Vocabulary


class Data(NamedTuple):
    """A data set: images, texts with their vocabulary, token ids, or floats of any shape.

    Bytes are normalised per channel as (x / 255 - mean) / std when they are read, floats as (x -
    mean) / std.
    """

    train: Samples
    test: Samples
    classes: int  # or values of each sample, if the targets are no classes
    mean: tuple[float, ...] = ()  # per channel, of values in 0..1
    std: tuple[float, ...] = ()  # floats: one number for all values, or one for each channel
    augment: tuple[str, ...] = ()  # names of training transforms, see ``transforms``
    vocabulary: Vocabulary | None = None  # None if the data set has no texts
    # client of each training and of each test sample, if the data set comes with a split
    owners: tuple[np.ndarray, np.ndarray] | None = None
    class_names: tuple[str, ...] = ()  # empty if the classes have no names
    # what the user should know about the files, one line each: "key = value: ..."
    hints: tuple[str, ...] = ()
    is_own: bool = False  # the user's arrays: their normalisation is part of the data
    # (number of token ids, token id of padding) of inputs that are token ids without a vocabulary
    token_settings: tuple[int, int] = (0, 0)
    targets: Targets = "classes"
    # class of each training and of each test text, for the partition of texts whose targets are
    # tokens
    topics: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def has_classes(self) -> bool:
        """Whether each sample has a class, be it the target or not."""
        return self.targets == "classes" or self.topics is not None

    @property
    def class_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """The class of each training and each test sample, int64; 0 if they have none."""
        if self.topics is not None:
            return self.topics
        sides = self.train.y, self.test.y
        if self.targets == "classes":
            return sides[0].numpy(), sides[1].numpy()
        return np.zeros(len(sides[0]), np.int64), np.zeros(len(sides[1]), np.int64)

    @property
    def label_classes(self) -> int:
        """The number of classes that ``class_labels`` count."""
        if self.topics is not None:
            return len(self.class_names)
        return self.classes if self.targets == "classes" else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: (ch, H, W) for an image, (L,) for a text, (F,) for features."""
        return tuple(self.train.x.shape[1:])

    @property
    def tokens(self) -> int:
        """Number of token ids: text inputs are integers below it. 0 for float inputs."""
        return self.vocabulary.size if self.vocabulary else self.token_settings[0]

    @property
    def padding(self) -> int:
        """Token id of padding; 0 for float inputs."""
        return self.vocabulary.padding if self.vocabulary else self.token_settings[1]

    @property
    def has_images(self) -> bool:
        """Whether an input is an image [ch, H, W]."""
        return not self.tokens and len(self.shape) == 3


@dataclass(frozen=True)
class Synthetic:
    """Settings of a Gaussian mixture for quick runs.

    A sample is the random prototype image of its class plus Gaussian noise. ``noise`` is the ratio
    of the standard deviation of the noise to that of the prototypes.
    """

    classes: int = 10
    train: int = 2000  # samples
    test: int = 500  # samples
    size: int = 8  # pixels
    channels: int = 1
    noise: float = 3.0  # at the other defaults a linear model reaches 81 %
    seed: int = 1

    def __post_init__(self) -> None:
        bounded(self, classes="[1, inf)", train="[1, inf)", test="[1, inf)")
        bounded(self, size="[1, inf)", channels="[1, inf)", noise="[0, inf)")


Transform = Literal["crop", "crop_mean", "flip", "rotate", "erase"]


@dataclass(frozen=True)
class Source:
    """The ``data`` block without the partition."""

    dataset: str  # a name in DATASETS, or module:function
    # Folder in which torchvision puts its folders. "folder": the folder with train/ and val/ or
    # test/. "csv", "table": the folder of the files. "pfllib": a folder dataset/NAME of
    # PFLlib; "leaf": the folder data/ of a data set of LEAF. A function of the user gets it if it
    # has a parameter ``root``.
    root: str = "~/data"
    download: bool = False
    # how the data of clients differ, or those of all from what a backbone saw; see ``feed.Feed``
    shift: Literal["none", "rotate", "labels", "permute", "rotate_inputs"] = "none"
    # auto: the official training transforms of the data set
    augment: Literal["auto", "none"] | tuple[Transform, ...] = "auto"
    image_size: int | None = None  # "folder" only: side in pixels to which images are resized
    synthetic: Synthetic = Synthetic()
    text: Text = Text()  # "ag_news" and "csv" only
    allow_pickle: bool = False  # "pfllib" only: its files are pickles
    path: str | None = None  # "npz" only: the file
    table: Table = Table()  # "table" only: the columns of its files
    # "text_lm" and "instruct" only: the keys of their lines; packing is for all texts whose targets
    # are tokens
    language: Language = Language()

    def __post_init__(self) -> None:
        check_path("root", self.root)
        if self.dataset == "npz" and not self.path:
            raise ValueError("path = null: dataset = npz needs the path of an npz file; give it")
        if self.path is not None and self.dataset != "npz":
            raise ValueError(f"path = {self.path}: only dataset = npz has a path; leave it out")
        if self.table != Table() and self.dataset != "table":
            raise ValueError("table: only dataset = table has this block; leave it out")
        if self.language.packing and self.dataset not in (*LANGUAGE_DATASETS, *_TEXT_READERS):
            raise ValueError("language.packing = true: only texts are packed; leave it out")
        keys = replace(self.language, packing=False)
        if keys != Language() and self.dataset not in LANGUAGE_DATASETS:
            raise ValueError(
                "language: only dataset = text_lm or instruct has this block; leave it out"
            )
        if self.path is not None:
            check_path("path", self.path)
        transforms = self.augment if isinstance(self.augment, tuple) else ()
        if len(set(transforms)) < len(transforms):
            raise ValueError(
                f"augment = {list(transforms)}: each transform works once; name it once"
            )
        if {"crop", "crop_mean"} <= set(transforms):
            raise ValueError(
                f"augment = {list(transforms)}: choose crop (black border) or crop_mean (of mean "
                "colour)"
            )
        if self.image_size is not None and self.dataset != "folder":
            raise ValueError(
                f"image_size = {self.image_size}: only dataset = folder resizes images; leave it "
                "out"
            )
        if self.allow_pickle and self.dataset != "pfllib":
            raise ValueError(
                "allow_pickle = true: only the files of dataset = pfllib are pickles; leave it out"
            )
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size = {self.image_size}: must be an integer of at least 1")

    @property
    def is_function(self) -> bool:
        """Whether the data come from a function of the user."""
        return ":" in self.dataset

    @property
    def place(self) -> str:
        """The setting, "key = value", that says where the data come from."""
        if self.path is not None:
            return f"path = {self.path}"
        return f"dataset = {self.dataset}" if self.is_function else f"root = {self.root}"


# Names of data sets; any other is a function of the user.
DATASETS = (
    "cifar10",
    "cifar100",
    "fashionmnist",
    "mnist",
    "tiny_imagenet",
    "folder",
    "digits",
    "synthetic",
    "ag_news",
    "csv",
    "pfllib",
    "leaf",
    "npz",
    "table",
    "text_lm",
    "instruct",
)
LANGUAGE_DATASETS = ("text_lm", "instruct")  # their targets are tokens


def load(source: Source, wanted: Targets | None = "classes") -> Data:
    """Return the data set; download missing files first if ``source.download`` is true.

    wanted: what the targets must be; None: any. Raises ValueError if files are missing or damaged,
    if a library is not installed, or if the data set has other targets.
    """
    is_own = source.is_function or source.dataset in _OWN_READERS
    is_text = source.dataset in (*_TEXT_READERS, *LANGUAGE_DATASETS)
    if wanted == "tokens" and not is_text:
        raise ValueError(
            f"dataset = {source.dataset}: has no texts to learn, and model.loss = next_token needs "
            f"them; choose {', '.join((*LANGUAGE_DATASETS, *_TEXT_READERS))}"
        )
    if source.dataset in LANGUAGE_DATASETS and wanted != "tokens":
        raise ValueError(
            f"dataset = {source.dataset}: has tokens as targets; set model.loss = next_token"
        )
    if wanted in ("labels", "numbers") and not is_own:
        raise ValueError(
            f"dataset = {source.dataset}: has a class of each sample, and model.loss needs "
            f"{wanted}; give data of your own (npz, table or module:function), or choose "
            "model.loss = cross_entropy"
        )
    if wanted == "tokens":
        return _load_language(source)
    if source.language.packing:
        raise ValueError(
            "language.packing = true: only texts that are learned token by token are packed; set "
            "model.loss = next_token, or leave it out"
        )
    if source.dataset in _TEXT_READERS:
        return _load_texts(source)
    if is_own:
        return _load_own(source, wanted)
    if source.dataset == "pfllib":
        folder = pfllib.read(source.root, source.allow_pickle)
        train, test = (
            Samples(torch.from_numpy(side.x), torch.from_numpy(side.y))
            for side in (folder.train, folder.test)
        )
        transforms = source.augment if isinstance(source.augment, tuple) else ()
        return Data(
            train,
            test,
            folder.classes,
            folder.mean,
            folder.std,
            transforms,
            owners=(folder.train.owner, folder.test.owner),
            hints=folder.hints,
        )
    raw = _READERS[source.dataset](source)
    mean, std = _NORMALIZATION.get(source.dataset) or _channel_moments(raw.train.x)
    presets = {"auto": _AUGMENTATION.get(source.dataset, ()), "none": ()}
    augment = presets[source.augment] if isinstance(source.augment, str) else source.augment
    return Data(
        raw.train,
        raw.test,
        raw.classes,
        mean,
        std,
        augment,
        class_names=raw.class_names,
        hints=raw.hints,
    )


def _load_own(source: Source, wanted: Targets | None) -> Data:
    """Return the user's arrays, checked as the files of the other data sets are."""
    arrays = (
        own.call_function(source.dataset, source.root)
        if source.is_function
        else _OWN_READERS[source.dataset](source, wanted)
    )
    checked = check(arrays, source.place, wanted)
    transforms = source.augment if isinstance(source.augment, tuple) else ()
    mean, std = checked.mean, checked.std
    if mean is None or std is None:
        mean, std = _channel_moments(checked.train.x)
    data = Data(
        checked.train,
        checked.test,
        checked.classes,
        mean,
        std,
        transforms,
        owners=checked.owners,
        class_names=checked.class_names,
        hints=checked.hints,
        is_own=True,
        token_settings=(checked.tokens, checked.padding),
        targets=checked.targets,
    )
    if source.shift == "labels" and data.targets != "classes":
        raise ValueError(
            f"shift = labels: needs a class of each sample, and the targets are {data.targets}; "
            "choose none or rotate"
        )
    if transforms and not data.has_images:
        raise ValueError(
            f"augment = {list(transforms)}: only images are transformed, an input here has the "
            f"shape {list(data.shape)}; leave it out"
        )
    return data


def read_texts(source: Source) -> RawTexts:
    """Return the texts and classes of ``ag_news`` or ``csv``; download and raise as ``load``."""
    return _TEXT_READERS[source.dataset](source)


def _load_texts(source: Source) -> Data:
    """Return a data set of texts, encoded with the given tokenizer.

    Without a tokenizer the vocabulary is made from the training texts.
    """
    raw, text = read_texts(source), source.text
    vocabulary = _vocabulary(text, raw.train.texts)
    train, test = (
        Samples(vocabulary.encode(side.texts), torch.tensor(side.y))
        for side in (raw.train, raw.test)
    )
    return Data(
        train,
        test,
        raw.classes,
        vocabulary=vocabulary,
        class_names=raw.class_names,
        hints=raw.hints,
    )


def _vocabulary(text: Text, train_texts: list[str], needs_padding: bool = True) -> Vocabulary:
    """Return the vocabulary of the given tokenizer, or else that of the training texts."""
    if text.tokenizer:
        return Vocabulary.from_tokenizer(text, needs_padding)
    return Vocabulary.from_texts(train_texts, text)


def _load_language(source: Source) -> Data:
    """Return a data set of texts whose targets are their next tokens."""
    text = replace(source.text, length=source.text.length + 1)  # the last is a target alone
    names: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    topics = None
    if source.dataset in LANGUAGE_DATASETS:
        train, test = (
            read_language(source.dataset, source.root, key, text, source.language)
            for key in ("train", "test")
        )
    else:
        raw = read_texts(source)
        train, test = (LanguageTexts.whole(side.texts) for side in (raw.train, raw.test))
        topics = np.array(raw.train.y, np.int64), np.array(raw.test.y, np.int64)
        names, hints = raw.class_names, raw.hints
    vocabulary = _vocabulary(text, train.texts, needs_padding=False)
    train_samples, test_samples = (
        language_samples(vocabulary, side, f"text.{key} = {getattr(text, key)}")
        for key, side in (("train", train), ("test", test))
    )
    return Data(
        train_samples,
        test_samples,
        vocabulary.size,
        vocabulary=vocabulary,
        owners=number_clients(train, test),
        class_names=names,
        hints=hints,
        targets="tokens",
        topics=topics,
    )


_CIFAR100 = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
_NORMALIZATION = {  # mean and std; other data sets use those of their training pixels
    "cifar10": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # official FedDecomp
    "cifar100": _CIFAR100,  # official FedDecomp
    "tiny_imagenet": _CIFAR100,  # official FedDecomp
    "mnist": ((0.1307,), (0.3081,)),  # of the training pixels; pytorch/examples
    "fashionmnist": ((0.2860,), (0.3530,)),  # of the training pixels
}
_AUGMENTATION = {  # official FedDecomp: none for CIFAR-10, no crop for Tiny ImageNet
    "cifar100": ("crop", "flip", "rotate"),
    "tiny_imagenet": ("flip", "rotate"),
}


def _channel_moments(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation per channel of [M, ch, H, W] bytes divided by 255."""
    value = torch.arange(256, dtype=torch.float64) / 255
    shares = [
        torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        for channel in x.unbind(1)
    ]
    mean = [float(p @ value) for p in shares]
    variance = [float(p @ (value - m) ** 2) for p, m in zip(shares, mean, strict=True)]
    return tuple(mean), tuple(v**0.5 or 1.0 for v in variance)  # 1 where a channel is constant


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
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "data.dataset = digits: scikit-learn is not installed; pip install "
            "'fedlora-mpi[digits]'"
        ) from error
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


_TEXT_READERS: dict[str, Callable[[Source], RawTexts]] = {
    "ag_news": _ag_news,
    "csv": lambda source: read_csv(str(expand_home(source.root)), source.text),
}
_OWN_READERS: dict[str, Callable[[Source, Targets | None], own.OwnData]] = {
    "npz": lambda source, _: own.read_npz(str(source.path)),
    "leaf": lambda source, _: read_leaf(source.root),
    "table": lambda source, wanted: read_tables(
        str(expand_home(source.root)), source.table, wanted
    ),
}
_READERS: dict[str, Callable[[Source], RawData]] = {
    "cifar10": _torchvision_reader("CIFAR10", "cifar-10-batches-py"),
    "cifar100": _torchvision_reader("CIFAR100", "cifar-100-python"),
    "fashionmnist": _torchvision_reader("FashionMNIST", "FashionMNIST/raw"),
    "mnist": _torchvision_reader("MNIST", "MNIST/raw"),
    "tiny_imagenet": _tiny_imagenet,
    "folder": lambda source: read_folder(source.root, source.image_size),
    "digits": _digits,
    "synthetic": _synthetic,
}
