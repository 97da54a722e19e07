"""Read data sets of image files, one folder per class."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ..core.paths import expand_home
from .images import decode_images
from .labels import similar_label_hints
from .samples import RawData, to_samples

# The suffixes that torchvision reads.
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Operating systems make these; names that begin with a dot are ignored as well.
_IGNORED_FOLDERS = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "lost+found"}
_IGNORED_FOLDERS |= {"System Volume Information"}


class ImageFiles(NamedTuple):
    """The image files of training or of testing."""

    names: tuple[str, ...]  # of the classes, sorted by code points in every locale
    paths: list[str]
    y: list[int]
    unread: Counter  # kind of file that is not read -> number of files


def read_folder(root: str, image_size: int | None) -> RawData:
    """Read ROOT/train/CLASS/* and ROOT/val/CLASS/* (or ROOT/test/CLASS/*) in torchvision's order.

    Hidden files and folders are skipped. Raises ValueError if a class has no image or if the two
    folders have different classes.
    """
    root_path = str(expand_home(root))
    test_folder = "val" if os.path.isdir(os.path.join(root_path, "val")) else "test"
    try:
        train, test = (
            _list_side(root, os.path.join(root_path, name)) for name in ("train", test_folder)
        )
    except OSError as error:
        raise ValueError(
            f"data.root = {root}: {error}; expected are train/CLASS/* and val/CLASS/* or "
            f"test/CLASS/* in {root_path}"
        ) from error
    if train.names != test.names:
        differing = ", ".join(sorted(set(train.names) ^ set(test.names)))
        raise ValueError(
            f"data.root = {root}: train and {test_folder} must hold the same classes; they "
            f"differ in {differing}"
        )
    (x, test_x), hints = decode_images((train.paths, test.paths), image_size)
    if x.shape[1:] != test_x.shape[1:]:
        raise ValueError(
            f"data.image_size = null: images in train and {test_folder} differ in size; set "
            "data.image_size"
        )
    hints += similar_label_hints(f"data.root = {root}", train.names)
    hints += _unread_hints(root, train.unread + test.unread)
    sides = (to_samples(x, train.y), to_samples(test_x, test.y))
    return RawData(*sides, len(train.names), train.names, hints)


def read_tiny_imagenet(home: str) -> RawData:
    """Read the official folder of Tiny ImageNet.

    Its val folder becomes the test set, because its test folder has no labels. Classes, and the
    files of a class, are in the order of their names; test files are in the order of
    val_annotations.txt. The official FedDecomp code has them in another order, so there the same
    seed gives the clients other samples, of the same distribution.
    """
    train = os.path.join(home, "train")
    names = _class_names(train)
    class_of_name = {name: c for c, name in enumerate(names)}
    paths, y = [], []
    for name in names:
        folder = os.path.join(train, name, "images")
        files = sorted(file for file in os.listdir(folder) if not _is_hidden(file))
        paths += [os.path.join(folder, file) for file in files]
        y += [class_of_name[name]] * len(files)
    test_paths, test_y = [], []
    for file, name in _annotations(os.path.join(home, "val", "val_annotations.txt"), class_of_name):
        test_paths.append(os.path.join(home, "val", "images", file))
        test_y.append(class_of_name[name])
    if not paths or not test_paths:
        side = "val" if paths else "train"
        raise ValueError(f"data.root: {home} holds no image in {side}; get the data set anew")
    (x, test_x), hints = decode_images((paths, test_paths), None)
    return RawData(to_samples(x, y), to_samples(test_x, test_y), len(names), names, hints)


def _annotations(file: str, index: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield (image file, class name) for each line; ``index`` holds the known class names."""
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.rstrip("\n").split("\t")
            if len(fields) < 2 or fields[1] not in index:
                raise ValueError(
                    f"data.root: {file}: line {number}: must name an image and a class of train/"
                )
            yield fields[0], fields[1]


def _list_side(root: str, folder: str) -> ImageFiles:
    """Return the images in ``folder``, which holds one folder per class.

    Raises OSError if a folder cannot be read, ValueError if there is no class or one has no image.
    """
    names = _class_names(folder)
    if not names:
        raise ValueError(
            f"data.root = {root}: {folder} holds no folder of a class; expected are "
            f"{folder}/CLASS/*"
        )
    paths: list[str] = []
    y: list[int] = []
    unread: Counter[str] = Counter()
    for label, name in enumerate(names):
        class_folder = os.path.join(folder, name)
        walk = sorted(_walk_visible(class_folder))
        files = [
            os.path.join(subfolder, file)
            for subfolder, names_inside in walk
            for file in sorted(names_inside)
        ]
        images = [path for path in files if _is_image(path)]
        unread.update(_unread_kind(path) for path in files if not _is_image(path))
        if not images:
            raise ValueError(
                f"data.root = {root}: {class_folder} holds no image; each folder in {folder} is a "
                f"class; remove it, or put files there that end in {' '.join(_IMAGE_SUFFIXES)}"
            )
        paths += images
        y += [label] * len(images)
    misplaced = sum(entry.is_file() and _is_image(entry.name) for entry in os.scandir(folder))
    unread += Counter({"beside the folders of the classes": misplaced})
    return ImageFiles(names, paths, y, unread)


def _class_names(folder: str) -> tuple[str, ...]:
    folders = (entry.name for entry in os.scandir(folder) if entry.is_dir())
    return tuple(sorted(name for name in folders if not _is_hidden(name)))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _IGNORED_FOLDERS


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    return name.lower().endswith(_IMAGE_SUFFIXES) and not _is_hidden(name)


def _unread_kind(path: str) -> str:
    """Return the kind under which a file that is not read is counted."""
    name = os.path.basename(path)
    ending = os.path.splitext(name)[1].lower()
    return "hidden" if _is_hidden(name) else ending or "without an ending"


def _walk_visible(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, files) for ``folder`` and all folders below it that are not hidden.

    Links are followed unless they lead back to the folder that holds them or to one above it.
    """

    def raise_error(error: OSError) -> None:
        raise error

    for current, folders, files in os.walk(folder, onerror=raise_error, followlinks=True):
        real_current = os.path.join(os.path.realpath(current), "")
        real = {name: os.path.realpath(os.path.join(current, name)) for name in folders}
        loops = {name for name in folders if real_current.startswith(os.path.join(real[name], ""))}
        folders[:] = [name for name in folders if not _is_hidden(name) and name not in loops]
        yield current, [name for name in files if not name.startswith("._") and name != ".DS_Store"]


def _unread_hints(root: str, unread: Counter) -> tuple[str, ...]:
    if not unread:
        return ()
    listed = ", ".join(f"{number} {kind}" for kind, number in sorted(unread.items()))
    images = f"images are what ends in {' '.join(_IMAGE_SUFFIXES)} in a class's folder"
    return (f"data.root = {root}: files not read: {listed}; {images}",)
