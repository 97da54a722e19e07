"""The ``data`` block without the partition: which data set, from where, and how it is changed."""

from dataclasses import dataclass, replace
from typing import Literal

from ..core.bounds import bounded
from ..core.paths import check_path
from .language import Language
from .tables import Table
from .texts import Text

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
TEXT_DATASETS = ("ag_news", "csv")  # texts with a class
LANGUAGE_DATASETS = ("text_lm", "instruct")  # their targets are tokens


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
        if self.language.packing and self.dataset not in (*LANGUAGE_DATASETS, *TEXT_DATASETS):
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
