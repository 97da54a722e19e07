"""Data sets from tiny files, augmentation against torchvision's functions, and the stacked batches
of clients.
"""

import builtins

import numpy as np
import pytest
import torch
from PIL import Image

from fedlora_mpi.algorithm import held_out_count
from fedlora_mpi.core.seeds import derive_key, isolate_rng, rng, uniform
from fedlora_mpi.core.vision import import_torchvision
from fedlora_mpi.data import transforms
from fedlora_mpi.data.datasets import Data, load
from fedlora_mpi.data.feed import Feed
from fedlora_mpi.data.inputs import Images
from fedlora_mpi.data.partition import Iid, Split
from fedlora_mpi.data.samples import Samples
from fedlora_mpi.data.source import Source, Synthetic

CPU = torch.device("cpu")
SIZES = (11, 7, 7, 3, 2)  # ragged clients, in decreasing order


def images(number, channels=3, height=5, width=5):
    return torch.randint(
        0,
        256,
        (number, channels, height, width),
        dtype=torch.uint8,
        generator=rng(1, "test", number),
    )


def data(channels=3, height=5, width=5, augment=()):
    sides = [Samples(images(m, channels, height, width), torch.arange(m) % 6) for m in (40, 35)]
    return Data(*sides, 6, (0.5, 0.4, 0.3)[:channels], (0.2, 0.3, 0.4)[:channels], augment)


def split():
    train = tuple(np.arange(n) * 3 + k for k, n in enumerate(SIZES))
    test = tuple(np.arange(n)[::-1].copy() + k for k, n in enumerate(SIZES))
    return Split(train, test, np.zeros((5, 6)), np.zeros((5, 6)))


def feed(of=None, shift="none", augment=False, seed=1, **more):
    return Feed(of or data(), split(), seed=seed, shift=shift, device=CPU, augment=augment, **more)


# Data sets


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="PNG")


def pixels(number, *shape):
    return np.random.RandomState(number).randint(0, 256, shape, dtype=np.uint8)


def tiny_imagenet(root):
    """The official folder with two classes; one training and one test image are grey."""
    home = root / "tiny-imagenet-200"
    for c, name in enumerate(("n02", "n01")):
        for i in range(3):
            shape = (64, 64) if i == 2 else (64, 64, 3)
            save(home / "train" / name / "images" / f"{name}_{i}.JPEG", pixels(10 * c + i, *shape))
    save(home / "val" / "images" / "val_0.JPEG", pixels(50, 64, 64, 3))
    save(home / "val" / "images" / "val_1.JPEG", pixels(51, 64, 64))
    (home / "val" / "val_annotations.txt").write_text(
        "val_1.JPEG\tn02\t0\t0\t9\t9\nval_0.JPEG\tn01\t0\t0\t9\t9\n"
    )


def test_tiny_imagenet_reads_the_official_folder(tmp_path):
    tiny_imagenet(tmp_path)
    read = load(Source("tiny_imagenet", root=str(tmp_path)))
    assert (
        read.classes == 2
        and read.train.x.shape == (6, 3, 64, 64)
        and read.train.x.dtype == torch.uint8
    )
    assert read.train.y.tolist() == [0, 0, 0, 1, 1, 1] and read.test.y.tolist() == [1, 0]
    assert np.array_equal(read.train.x[3].permute(1, 2, 0), pixels(0, 64, 64, 3))  # n02 is class 1
    assert np.array_equal(read.train.x[5], np.stack([pixels(2, 64, 64)] * 3))
    assert np.array_equal(read.test.x[0], np.stack([pixels(51, 64, 64)] * 3))
    assert read.mean == (0.507, 0.487, 0.441) and read.augment == ("flip", "rotate")
    assert load(Source("tiny_imagenet", root=str(tmp_path), augment="none")).augment == ()


def test_tiny_imagenet_is_in_the_order_of_names_and_of_the_annotations(tmp_path):
    home = tmp_path / "tiny-imagenet-200"
    for number, name in enumerate(("n10", "n9")):  # as texts, 1 is before 9
        for file, value in (("n_2", 1), ("n_10", 0)):
            image = np.full((64, 64, 3), 2 * number + value, np.uint8)
            save(home / "train" / name / "images" / f"{file}.png", image)
    for value in (7, 8):
        save(home / "val" / "images" / f"val_{value}.png", np.full((64, 64, 3), value, np.uint8))
    (home / "val" / "val_annotations.txt").write_text("val_8.png\tn10\nval_7.png\tn9\n")
    read = load(Source("tiny_imagenet", root=str(tmp_path)))
    assert read.train.x[:, 0, 0, 0].tolist() == [0, 1, 2, 3] and read.test.y.tolist() == [0, 1]
    assert read.test.x[:, 0, 0, 0].tolist() == [8, 7] and read.train.y.tolist() == [0, 0, 1, 1]


def image_folder(root, second="val", classes=("ant", "bee"), width=6):
    for side, names in (("train", ("ant", "bee")), (second, classes)):
        for c, name in enumerate(names):
            for i in range(2):
                save(
                    root / side / name / f"{i}.png",
                    pixels(c, 6, width if side == "train" else 6, 3),
                )


@pytest.mark.parametrize("second", ["val", "test"])
def test_a_folder_of_images_is_a_data_set(tmp_path, second):
    image_folder(tmp_path, second)
    read = load(Source("folder", root=str(tmp_path)))
    assert read.classes == 2 and read.test.y.tolist() == [0, 0, 1, 1]
    assert np.array_equal(read.train.x[2].permute(1, 2, 0), pixels(1, 6, 6, 3))
    fractions = read.train.x.double() / 255
    assert read.mean == pytest.approx(fractions.mean((0, 2, 3)).tolist())
    assert read.std == pytest.approx(fractions.std((0, 2, 3), correction=0).tolist())


def test_images_of_a_folder_are_resized(tmp_path):
    image_folder(tmp_path, width=9)
    assert load(Source("folder", root=str(tmp_path), image_size=4)).train.x.shape == (4, 3, 4, 4)
    with pytest.raises(
        ValueError,
        match="image_size = null: images in train and val differ in size; set data.image",
    ):
        load(Source("folder", root=str(tmp_path)))
    save(tmp_path / "train" / "bee" / "9.png", pixels(9, 7, 9, 3))
    with pytest.raises(
        ValueError, match="9.png is 9 x 7 pixels, the first image is 9 x 6; set data.image_size"
    ):
        load(Source("folder", root=str(tmp_path)))


def test_a_folder_must_be_whole(tmp_path):
    with pytest.raises(
        ValueError, match=r"^data.root = .*; expected are train/CLASS/\* and val/CLASS/\*"
    ):
        load(Source("folder", root=str(tmp_path)))
    image_folder(tmp_path, classes=("ant", "cow"))
    with pytest.raises(
        ValueError, match="train and val must hold the same classes; they differ in bee, cow"
    ):
        load(Source("folder", root=str(tmp_path)))


def test_digits_are_split_by_class():
    pytest.importorskip("sklearn")
    one, two = load(Source("digits")), load(Source("digits"))
    assert one.train.x.shape[1:] == (1, 8, 8) and one.train.x.max() == 240
    assert len(one.train.y) + len(one.test.y) == 1797
    train, test = torch.bincount(one.train.y), torch.bincount(one.test.y)
    assert (abs(test / (train + test) - 0.2) < 0.01).all()
    assert torch.equal(one.test.x, two.test.x)


def test_digits_without_sklearn_say_what_to_install(monkeypatch):
    genuine = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'fedlora-mpi\[digits\]'"):
        load(Source("digits"))


def test_synthetic_data_follow_their_seed():
    spec = {"classes": 4, "train": 30, "test": 10, "size": 5, "channels": 2}
    one, same, other = (
        load(Source("synthetic", synthetic=Synthetic(**spec, seed=s))) for s in (1, 1, 2)
    )
    assert one.train.x.shape == (30, 2, 5, 5) and one.test.y.tolist() == [
        0,
        1,
        2,
        3,
        0,
        1,
        2,
        3,
        0,
        1,
    ]
    assert torch.equal(one.train.x, same.train.x) and not torch.equal(one.train.x, other.train.x)


def test_synthetic_data_without_noise_are_prototypes():
    read = load(Source("synthetic", synthetic=Synthetic(classes=3, noise=0.0)))
    assert torch.equal(read.train.x[:3], read.test.x[3:6])
    assert len(torch.unique(read.train.x, dim=0)) == 3


def test_constants_of_mnist_are_read_from_its_files(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, number in (("train", 3), ("t10k", 2)):
        sizes = b"".join(n.to_bytes(4, "big") for n in (number, 28, 28))
        (folder / f"{name}-images-idx3-ubyte").write_bytes(
            b"\0\0\x08\x03" + sizes + bytes(range(number)) * 784
        )
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + sizes[:4] + bytes(range(7, 7 + number))
        )
    read = load(Source("mnist", root=str(tmp_path)))
    assert read.train.x.shape == (3, 1, 28, 28) and read.test.y.tolist() == [7, 8]
    assert (read.mean, read.std, read.augment) == ((0.1307,), (0.3081,), ())


@pytest.mark.parametrize(
    "dataset, folder",
    [
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("mnist", "MNIST/raw"),
        ("fashionmnist", "FashionMNIST/raw"),
        ("tiny_imagenet", "tiny-imagenet-200"),
    ],
)
def test_missing_files_name_the_folder_and_the_way_out(tmp_path, dataset, folder):
    with pytest.raises(ValueError, match=f"^data.root = .* in .*/{folder}; .* data.download=true$"):
        load(Source(dataset, root=str(tmp_path)))


def test_impossible_sources_are_refused():
    with pytest.raises(ValueError, match="image_size = 32: only dataset = folder"):
        Source("cifar10", image_size=32)
    with pytest.raises(ValueError, match="image_size = 0: must be"):
        Source("folder", image_size=0)
    with pytest.raises(ValueError, match="classes = 0: must be"):
        Synthetic(classes=0)
    with pytest.raises(ValueError, match="noise = -1: must be"):
        Synthetic(noise=-1)


# Augmentation


def warped(x, **parameters):
    """``transforms.warp`` on images [B, ch, H, W], of which all is shown."""
    moved, shown = transforms.warp(x.permute(0, 2, 3, 1), **parameters)
    assert shown is None
    return moved.permute(0, 3, 1, 2)


def test_crop_flip_and_rotation_are_those_of_torchvision_in_its_order():
    functional = import_torchvision().transforms.functional
    x = images(60, 3, 13, 9)
    drawn = transforms.draw_parameters(("crop", "flip", "rotate"), 60, rng(3), (13, 9))
    expected = []
    for image, (down, right), flip, degrees in zip(
        x, drawn["crop"], drawn["flip"], drawn["rotate"], strict=True
    ):
        image = functional.pad(image, 4)
        image = functional.crop(image, 4 + int(down), 4 + int(right), 13, 9)
        image = functional.hflip(image) if flip else image
        expected.append(functional.rotate(image, float(degrees)))
    assert torch.equal(warped(x, **drawn), torch.stack(expected))
    assert torch.equal(warped(x.float(), **drawn), torch.stack(expected).float())


def test_each_transform_works_alone():
    functional = import_torchvision().transforms.functional
    x = images(20)
    drawn = transforms.draw_parameters(("flip", "rotate"), 20, rng(4), (5, 5))
    assert list(drawn) == ["flip", "rotate"]
    flipped = torch.where(drawn["flip"][:, None, None, None], x.flip(-1), x)
    assert torch.equal(warped(x, flip=drawn["flip"]), flipped)
    turned = [
        functional.rotate(image, float(angle))
        for image, angle in zip(x, drawn["rotate"], strict=True)
    ]
    assert torch.equal(warped(x, rotate=drawn["rotate"]), torch.stack(turned))
    assert torch.equal(warped(x), x)


@pytest.mark.parametrize("size", [4, 5])
def test_a_quarter_turn_loses_no_pixel(size):
    x = images(6, 2, size, size)
    for quarter in range(4):
        assert torch.equal(
            warped(x, turn=torch.full((6,), 90.0 * quarter)), torch.rot90(x, quarter, (2, 3))
        )


def test_drawn_parameters_cover_their_ranges():
    drawn = transforms.draw_parameters(("crop", "flip", "rotate"), 2000, rng(5), (5, 5))
    assert sorted(set(drawn["crop"].flatten().tolist())) == list(range(-4, 5))
    assert abs(drawn["flip"].float().mean() - 0.5) < 0.05
    assert 14.9 < drawn["rotate"].max() < 15 and -15 <= drawn["rotate"].min() < -14.9


def test_rectangles_are_distributed_as_torchvision_draws_them():
    erasing = import_torchvision().transforms.RandomErasing
    n, size = 4000, (32, 24)
    with isolate_rng(1, "test"):
        theirs = [
            erasing.get_params(torch.zeros(3, *size), (0.04, 0.2), (0.5, 2.0)) for _ in range(n)
        ]
    theirs = torch.tensor([found[:4] for found in theirs]).double()
    ours = transforms.draw_parameters(("erase",), 2 * n, rng(6), size)["erase"]
    some = ours[:, 2] > 0
    assert abs(some.double().mean() - 0.5) < 0.02 and (ours[~some][:, 2:] == 0).all()
    ours = ours[some].double()
    for column in range(4):
        a, b = (side[:, column].sort().values for side in (ours, theirs))
        grid = torch.arange(33.0)
        gap = torch.searchsorted(a, grid, right=True) / len(a) - torch.searchsorted(
            b, grid, right=True
        ) / len(b)
        assert gap.abs().max() < 1.95 * (2 / n) ** 0.5  # Kolmogorov and Smirnov, 0.1 %
    assert (ours[:, 0] + ours[:, 2]).max() <= 32 and (ours[:, 1] + ours[:, 3]).max() <= 24
    area = ours[:, 2] * ours[:, 3] / (32 * 24)
    assert 0.03 < area.min() < 0.05 and 0.19 < area.max() < 0.22


def test_an_image_too_flat_for_any_rectangle_stays_whole():
    assert (transforms.draw_parameters(("erase",), 50, rng(7), (1, 30))["erase"][:, 2:] == 0).all()


def test_erasing_moves_no_other_draw():
    names = ("crop", "flip", "rotate")
    a, b = (
        transforms.draw_parameters(which, 50, rng(8), (9, 9))
        for which in (names, (*names, "erase"))
    )
    assert all(torch.equal(a[name], b[name]) for name in names)


def test_erasing_and_the_border_of_mean_colour_are_those_of_torchvision_on_normalised_images():
    functional = import_torchvision().transforms.functional
    of = data(height=13, width=13, augment=("erase", "crop_mean", "flip"))
    mean, std = (torch.tensor(v)[:, None, None] for v in (of.mean, of.std))
    drawn = transforms.draw_parameters(of.augment, 11, rng(1, "augment", 0, 3, 2), (13, 13))
    order = torch.randperm(11, generator=rng(1, "order", 0, 3, 2))
    expected = []
    for image, *how in zip(of.train.x[split().train[0]][order], *drawn.values(), strict=True):
        (top, left, height, width), (down, right), flip = (v.tolist() for v in how)
        image = functional.erase(
            (image / 255 - mean) / std, top, left, height, width, torch.zeros(())
        )
        image = functional.crop(functional.pad(image, 4), 4 + down, 4 + right, 13, 13)
        expected.append(functional.hflip(image) if flip else image)
    batch = feed(of, augment=True).epoch([0], 3, 2).batch(1, 0, 11)
    assert torch.allclose(batch.x[0], torch.stack(expected), atol=1e-6)
    assert (torch.stack(expected) == 0).any() and (drawn["erase"][:, 2] > 0).any()


def test_the_order_of_the_authors_has_the_same_images_under_mirrored_parameters():
    # Flip, erase, crop is erase, crop, flip with rectangle and window mirrored, which are as
    # probable.
    functional = import_torchvision().transforms.functional
    image = images(1, 3, 9, 9)[0].float()
    moves = {
        "erase": torch.tensor([[2, 1, 3, 4]]),
        "crop_mean": torch.tensor([[1, -2]]),
        "flip": torch.tensor([True]),
    }
    theirs = functional.erase(functional.hflip(image), 2, 9 - 1 - 4, 3, 4, torch.zeros(()))
    theirs = functional.crop(functional.pad(theirs, 4), 4 + 1, 4 + 2, 9, 9)
    moved, shown = transforms.warp(image.permute(1, 2, 0)[None], **moves)
    assert torch.equal((moved * shown[..., None])[0].permute(2, 0, 1), theirs)


def test_transforms_are_chosen_by_name():
    chosen = Source("synthetic", augment=("flip", "erase"), synthetic=Synthetic(train=9, test=9))
    assert load(chosen).augment == ("flip", "erase")
    with pytest.raises(
        ValueError, match=r"^augment = \['flip', 'flip'\]: each transform works once"
    ):
        Source("digits", augment=("flip", "flip"))
    with pytest.raises(ValueError, match=r"^augment = \['crop', 'crop_mean'\]: choose crop"):
        Source("digits", augment=("crop", "crop_mean"))


# Batches


def same(a, b):
    return all(u is v or torch.equal(u, v) for u, v in zip(a, b, strict=True))


def test_a_batch_is_normalised_as_by_torchvision_and_channels_last():
    import_torchvision()  # opens the door for the import
    from torchvision.transforms import v2

    of = data()
    expected = v2.Normalize(of.mean, of.std)(
        v2.ToDtype(torch.float32, scale=True)(of.test.x[split().test[1].copy()])
    )
    batch = feed(of).test_batch([1], 0, 7)
    assert torch.allclose(batch.x[0], expected, atol=1e-6) and batch.x.dtype == torch.float32
    assert batch.x[0].is_contiguous(memory_format=torch.channels_last)
    assert batch.y.tolist() == [[(i + 1) % 6 for i in range(7)][::-1]] and batch.real is None


@pytest.mark.parametrize("shift", ["none", "rotate", "labels"])
@pytest.mark.parametrize("augment", [False, True])
def test_a_client_is_independent_of_its_neighbours(shift, augment):
    f = feed(data(augment=("crop", "flip", "rotate")), shift, augment)
    together = f.epoch([0, 3, 1, 2], 4, 1).batch(4, 2, 4)
    for c, k in enumerate([0, 3, 1, 2]):
        alone = f.epoch([k], 4, 1).batch(1, 2, 4)
        real = together.real[c]
        assert torch.equal(together.x[c][real], alone.x[0][real]) and torch.equal(
            together.key[c], alone.key[0]
        )
        assert torch.equal(together.y[c][real], alone.y[0][real])


@pytest.mark.parametrize("at_once", [1, 5 * 4 * 75 * 2, 2**20])
@pytest.mark.parametrize("used", [None, (5, 5, 4, 1, 0)])
def test_batches_gathered_several_at_once_are_those_gathered_one_by_one(at_once, used, monkeypatch):
    monkeypatch.setattr("fedlora_mpi.data.feed._GATHER_NUMEL", at_once)
    beats, read = [], Images.read
    f = feed(
        data(augment=("crop", "flip", "rotate")),
        "labels",
        augment=True,
        on_batch=lambda: beats.append(0),
    )
    epoch, gathers = f.epoch(range(5), 4, 1), []
    epoch = epoch.truncate(used) if used else epoch
    monkeypatch.setattr(Images, "read", lambda *given: gathers.append(0) or read(*given))
    found = list(epoch.batches(range(0, epoch.sizes[0], 4)))
    steps = len(range(0, epoch.sizes[0], 4))
    full = epoch.sizes[0] // 4
    several = max(1, min(full, at_once // 1500))
    assert len(found) == len(beats) == steps and len(gathers) == -(-full // several) + steps - full
    for step, (count, batch) in enumerate(found):
        assert count == sum(size > 4 * step for size in used or SIZES)
        alone = epoch.batch(count, 4 * step, min(4, epoch.sizes[0] - 4 * step))
        assert same(batch, alone) and (batch.x.stride(), batch.y.stride()) == (
            alone.x.stride(),
            alone.y.stride(),
        )


@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_shows_every_sample_once_and_marks_padding(augment):
    f = feed(data(augment=("flip",)), augment=augment)
    epoch = f.epoch(range(5), 1, 0)
    real = torch.cat([epoch.batch(5, first, 4).real for first in (0, 4, 8)], dim=1)
    assert real.sum(dim=1).tolist() == list(SIZES) and real.shape == (5, 12)
    labels = torch.cat([epoch.batch(1, first, 4).y for first in (0, 4, 8)], dim=1)[0][:11]
    assert sorted(labels.tolist()) == sorted(data().train.y[split().train[0]].tolist())
    assert epoch.batch(3, 0, 7).real is None and epoch.batch(4, 0, 7).real.sum() == 24
    assert epoch.batch(3, 0, 7).x.shape == (3, 7, 3, 5, 5)


def test_training_order_follows_seed_round_and_epoch():
    def order(seed, round_, epoch):
        return feed(seed=seed).epoch([0], round_, epoch).batch(1, 0, 11).x

    assert torch.equal(order(1, 2, 3), order(1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(order(1, 2, 3), order(*other))


def test_the_order_is_the_keyed_permutation():
    batch = feed().epoch([2], 5, 1).batch(1, 0, 7)
    order = torch.randperm(7, generator=rng(1, "order", 2, 5, 1))
    assert batch.y[0].tolist() == data().train.y[split().train[2]][order].tolist()


def test_augmentation_changes_training_and_spares_the_test():
    of = data(augment=("crop", "flip", "rotate"))
    plain, augmented = feed(of), feed(of, augment=True)
    assert not torch.equal(
        plain.epoch([0], 1, 0).batch(1, 0, 11).x, augmented.epoch([0], 1, 0).batch(1, 0, 11).x
    )
    assert same(plain.test_batch(range(5), 0, 11), augmented.test_batch(range(5), 0, 11))


def test_augmentation_is_that_of_the_keyed_parameters():
    of = data(augment=("crop", "flip", "rotate"))
    drawn = transforms.draw_parameters(of.augment, 7, rng(1, "augment", 1, 3, 2), (5, 5))
    order = torch.randperm(7, generator=rng(1, "order", 1, 3, 2))
    moved = warped(of.train.x[split().train[1]][order], **drawn)
    mean, std = (torch.tensor(v)[:, None, None] for v in (of.mean, of.std))
    batch = feed(of, augment=True).epoch([1], 3, 2).batch(1, 2, 4)
    assert torch.allclose(batch.x[0], ((moved / 255 - mean) / std)[2:6], atol=1e-6)


def test_shift_rotate_turns_a_clients_images_by_its_quarter():
    plain, shifted = feed(), feed(shift="rotate")
    for k in range(5):
        for side in ("train", "test"):
            a, b = (
                f.test_batch([k], 0, 2) if side == "test" else f.epoch([k], 1, 0).batch(1, 0, 2)
                for f in (plain, shifted)
            )
            assert torch.equal(b.x, torch.rot90(a.x, k % 4, (3, 4))) and torch.equal(a.y, b.y)


def test_shift_rotate_is_applied_before_the_augmentation():
    of = data(augment=("flip",))
    turned = of._replace(train=of.train._replace(x=torch.rot90(of.train.x, 1, (2, 3)).contiguous()))
    a, b = feed(of, "rotate", augment=True), feed(turned, augment=True)
    assert same(a.epoch([1], 1, 0).batch(1, 0, 7), b.epoch([1], 1, 0).batch(1, 0, 7))


def test_shift_rotate_needs_square_images():
    with pytest.raises(
        ValueError, match="^data.shift = rotate: needs square images, these are 4 x 5"
    ):
        feed(data(height=4), "rotate")


def numbers(*shape):
    sides = [Samples(torch.randn(m, *shape, generator=rng(1, m)), torch.arange(m) % 6) for m in (40, 35)]  # fmt: skip
    return Data(*sides, 6, (0.5,), (0.2,), ())


def batches(f):
    return f.epoch([0, 3], 1, 0).batch(2, 0, 2).x, f.test_batch([0, 3], 0, 2).x


@pytest.mark.parametrize("of", [data(), numbers(7), numbers(3, 7)], ids=["images", "7", "3x7"])
def test_shift_permute_reorders_the_numbers_of_all_clients_alike(of):
    plain, shifted = (batches(feed(of, shift)) for shift in ("none", "permute"))
    # [rows, places]: pixels keep their channels, features of a sequence change places within a step
    before, after = (
        torch.cat([(v.flatten(3) if of.has_images else v).flatten(0, -2) for v in sides])
        for sides in (plain, shifted)
    )
    order = (before[:, :, None] == after[:, None]).all(0).int().argmax(0)
    assert torch.equal(before[:, order], after)
    assert sorted(order.tolist()) == [*range(len(order))] != order.tolist()
    other_seed = batches(feed(of, "permute", seed=2))
    assert not torch.equal(other_seed[1], shifted[1])


@pytest.mark.parametrize("of", [numbers(7), numbers(3, 7)], ids=["7", "3x7"])
def test_shift_rotate_inputs_turns_all_vectors_by_one_orthogonal_matrix(of):
    plain, shifted = (batches(feed(of, "rotate_inputs")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(plain, shifted, strict=True))
    plain = batches(feed(of))
    a, b = (torch.cat([v.reshape(-1, 7) for v in sides]) for sides in (plain, shifted))
    wide = numbers(7)._replace(
        train=Samples(torch.eye(7).repeat(6, 1)[:40] * 0.2 + 0.5, torch.arange(40) % 6)
    )
    rotation = feed(wide, "rotate_inputs")._train.values[:7]  # row i: Q e_i
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(7), rtol=0, atol=1e-6)
    torch.testing.assert_close(a @ rotation, b, rtol=1e-5, atol=1e-5)
    assert (a - b).abs().max() > 1


def test_shifts_of_inputs_refuse_what_they_cannot_change():
    with pytest.raises(
        ValueError, match="^data.shift = rotate_inputs: needs feature vectors, these are images"
    ):
        feed(data(), "rotate_inputs")
    texts = numbers(7)._replace(
        train=Samples(torch.ones(40, 7, dtype=torch.int32), torch.zeros(40, dtype=torch.int64)),
        token_settings=(9, 0),
    )
    with pytest.raises(
        ValueError, match="^data.shift = permute: needs numbers or images, these are texts"
    ):
        feed(texts, "permute")
    with pytest.raises(ValueError, match="^data.shift = permute: leaves nothing to augment"):
        feed(data(augment=("flip",)), "permute", augment=True)


def test_shift_labels_moves_a_clients_classes():
    plain, shifted = feed(), feed(shift="labels")
    a, b = (f.test_batch(range(5), 0, 2) for f in (plain, shifted))
    assert torch.equal(b.y, (a.y + torch.tensor([0, 1, 2, 3, 0])[:, None]) % 6) and torch.equal(
        a.x, b.x
    )
    a, b = (f.epoch([3], 1, 0).batch(1, 0, 3) for f in (plain, shifted))
    assert torch.equal(b.y, (a.y + 3) % 6)


def test_noise_keys_are_those_of_client_round_epoch_and_step():
    f = feed()
    assert f.epoch([4, 2], 3, 1).batch(2, 0, 2).key.tolist() == [
        derive_key(1, "noise", k, 3, 1) for k in (4, 2)
    ]
    keys = [
        int(f.epoch([k], r, e).batch(1, s, 2).key)
        for k in (0, 1)
        for r in (1, 2)
        for e in (0, 1)
        for s in (0, 2, 4)
    ]
    assert len(set(keys)) == 24 and min(keys) >= 0


def test_the_numbers_of_an_address_do_not_run_into_each_other():
    assert (
        len(
            {
                derive_key(*address)
                for address in ((1, 2, 34), (1, 23, 4), (12, 3, 4), (1234,), (1, "2", 34))
            }
        )
        == 5
    )


def test_noise_of_two_steps_is_not_the_same_row_moved_along():
    epoch = feed().epoch([0], 1, 0)
    a, b = (set(uniform(epoch.batch(1, first, 2).key[0], (4000,)).tolist()) for first in (0, 2))
    assert len(a & b) < 10


def test_sizes_and_shape_are_told():
    f = Feed(data(1), Iid(clients=4, train=0, test=0).split(np.zeros(40, int), np.zeros(35, int), 6),
             seed=1, shift="none", device=CPU, augment=True)  # fmt: skip
    assert (f.classes, f.shape, f.train_size(3), f.test_size(0)) == (6, (1, 5, 5), 10, 8)
    assert f.test_batch([0, 1], 4, 4).x.shape == (2, 4, 1, 5, 5)


# Samples that are held out


def test_at_least_one_sample_is_held_out_but_never_all():
    assert [held_out_count(n, 0.05) for n in (1, 2, 19, 20, 39, 40, 500)] == [0, 1, 1, 1, 1, 2, 25]
    assert [held_out_count(n, 0.99) for n in (1, 2, 3, 200)] == [0, 1, 2, 198]
    assert [held_out_count(n, 0.0) for n in (1, 2, 500)] == [0, 0, 0]
    for fraction in (0.05, 0.3, 0.5, 0.9):  # a larger client has no smaller part of either kind
        held = [held_out_count(n, fraction) for n in range(1, 300)]
        rest = [n - h for n, h in enumerate(held, 1)]
        assert held == sorted(held) and rest == sorted(rest)


def rows(epoch):
    """The samples of each client, in order."""
    return [row[:size].tolist() for row, size in zip(epoch.rows, epoch.sizes, strict=True)]


def test_held_out_samples_are_the_same_in_all_rounds_and_never_train():
    f, whole = feed(), [set(mine.tolist()) for mine in split().train]
    known = rows(f.epoch(range(5), 0, 0, 0.3, True))
    assert [len(mine) for mine in known] == [3, 2, 2, 1, 1]
    for round_, epoch in ((0, 0), (0, 1), (3, 0), (3, "own")):
        held, rest = (rows(f.epoch(range(5), round_, epoch, 0.3, only)) for only in (True, False))
        assert [set(mine) for mine in held] == [set(mine) for mine in known]
        assert not any(set(a) & set(b) for a, b in zip(held, rest, strict=True))
        assert [set(a) | set(b) for a, b in zip(held, rest, strict=True)] == whole
        assert [len(a) + len(b) for a, b in zip(held, rest, strict=True)] == list(SIZES)
    alone = rows(f.epoch([2], 3, "own", 0.3, True))[0]
    assert alone == held[2]
    other = rows(feed(seed=2).epoch(range(5), 0, 0, 0.3, True))
    assert [set(mine) for mine in other] != [set(mine) for mine in known]
    orders = {tuple(rows(f.epoch([0], round_, 0, 0.3, False))[0]) for round_ in range(4)}
    assert len(orders) == 4


def test_without_a_fraction_nothing_is_held_out():
    f = feed(data(augment=("flip",)), augment=True)
    assert same(
        f.epoch(range(5), 1, 0).batch(5, 0, 11), f.epoch(range(5), 1, 0, 0.0, False).batch(5, 0, 11)
    )


def test_held_out_samples_are_not_augmented():
    of = data(augment=("crop", "flip", "rotate"))
    plain, augmented = (
        f.epoch([0], 1, 0, 0.5, True).batch(1, 0, 5) for f in (feed(of), feed(of, augment=True))
    )
    assert same(plain, augmented)
    plain, augmented = (
        f.epoch([0], 1, 0, 0.5, False).batch(1, 0, 6) for f in (feed(of), feed(of, augment=True))
    )
    assert torch.equal(plain.y, augmented.y) and not torch.equal(plain.x, augmented.x)
