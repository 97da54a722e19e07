"""Load a data set into memory.

Images are bytes, with their normalisation and training augmentation. Texts are token ids. A
user's own data may also be floats of any shape.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.losses import Targets
from . import own, pfllib
from .language import (
    LanguageTexts,
    hint_at_targetless,
    language_samples,
    number_clients,
    read_language,
)
from .own_checks import check
from .readers import OWN_READERS, READERS, TEXT_READERS
from .samples import RawTexts, Samples
from .source import LANGUAGE_DATASETS, TEXT_DATASETS, Source
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


def load(source: Source, wanted: Targets | None = "classes") -> Data:
    """Return the data set; download missing files first if ``source.download`` is true.

    wanted: what the targets must be; None: any. Raises ValueError if files are missing or damaged,
    if a library is not installed, if the data set has other targets, or if ``source.shift`` or
    ``source.augment`` does not fit what it has.
    """
    data = _load(source, wanted)
    if source.shift == "labels" and data.targets != "classes":
        raise ValueError(
            f"shift = labels: needs a class of each sample, and the targets are {data.targets}; "
            f"choose none{' or rotate' if data.has_images else ''}"
        )
    if isinstance(source.augment, tuple) and source.augment and not data.has_images:
        raise ValueError(
            f"augment = {list(source.augment)}: only images are transformed, an input here "
            f"{'is a text' if data.tokens else f'has the shape {list(data.shape)}'}; leave it out"
        )
    return data


def _load(source: Source, wanted: Targets | None) -> Data:
    """Return the data set; see ``load``."""
    is_own = source.is_function or source.dataset in OWN_READERS
    is_text = source.dataset in (*TEXT_DATASETS, *LANGUAGE_DATASETS)
    if wanted == "tokens" and not is_text:
        raise ValueError(
            f"dataset = {source.dataset}: has no texts to learn, and model.loss = next_token needs "
            f"them; choose {', '.join((*LANGUAGE_DATASETS, *TEXT_DATASETS))}"
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
    if source.dataset in TEXT_DATASETS:
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
    raw = READERS[source.dataset](source)
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
        else OWN_READERS[source.dataset](source, wanted)
    )
    checked = check(arrays, source.place, wanted)
    transforms = source.augment if isinstance(source.augment, tuple) else ()
    mean, std = checked.mean, checked.std
    if mean is None or std is None:
        mean, std = _channel_moments(checked.train.x)
    return Data(
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


def read_texts(source: Source) -> RawTexts:
    """Return the texts and classes of ``ag_news`` or ``csv``; download and raise as ``load``."""
    return TEXT_READERS[source.dataset](source)


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
    settings = [f"text.{key} = {getattr(text, key)}" for key in ("train", "test")]
    train_samples, test_samples = (
        language_samples(vocabulary, side, setting)
        for side, setting in zip((train, test), settings, strict=True)
    )
    hints += hint_at_targetless(train_samples, settings[0])
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
