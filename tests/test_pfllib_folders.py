"""Folders of PFLlib that are not whole, hold too much, or count their classes otherwise: what is
there is said.
"""

import json

import numpy as np
import pytest
import torch

from fedlora_mpi.data.datasets import load
from fedlora_mpi.data.source import Source


def put(folder, clients=range(3), test=None, labels=range(4), **about):
    """Files of plain arrays, six samples each, and config.json if ``about`` has something."""
    labels = np.array([*labels])
    for side, numbers in (("train", clients), ("test", clients if test is None else test)):
        (folder / side).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            y = labels[np.arange(6) % len(labels)]
            np.savez(folder / side / f"{number}.npz", x=np.full((6, 1, 2, 3), 7, np.uint8), y=y)
    if about:
        (folder / "config.json").write_text(json.dumps(about))
    return folder


def reading(folder):
    return load(Source("pfllib", root=str(folder)))


def refused(folder):
    """The one line that is said."""
    with pytest.raises(ValueError) as error:
        reading(folder)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"root = {folder}: ")
    return str(error.value)


# --- Which clients


def test_a_whole_folder_is_read_with_or_without_config(tmp_path):
    for name, about in (("a", {}), ("b", {"num_clients": 12, "num_classes": 4})):
        found = reading(put(tmp_path / name, range(12), **about))
        assert (
            found.classes == 4
            and found.hints == ()
            and found.owners[0].tolist() == np.repeat(range(12), 6).tolist()
        )


GAPS = {
    "a gap": ((0, 1, 3), None, {}, "train/2.npz", "train/ has 0 to 1, 3; test/ has 0 to 1, 3)"),
    "a gap, and told": (
        (0, 1, 3),
        None,
        {"num_clients": 4},
        "train/2.npz",
        "3; config.json says num_clients = 4)",
    ),
    "no first": ((1, 2), None, {}, "train/0.npz", "train/ has 1 to 2; "),
    "a gap in test alone": (
        range(4),
        (0, 2, 3),
        {},
        "test/1.npz",
        "train/ has 0 to 3; test/ has 0, 2 to 3)",
    ),
    "fewer in test": (range(4), range(2), {}, "test/2.npz", "train/ has 0 to 3; test/ has 0 to 1)"),
    "fewer in train": (
        range(2),
        range(4),
        {},
        "train/2.npz",
        "train/ has 0 to 1; test/ has 0 to 3)",
    ),
    "fewer than told": (
        range(3),
        None,
        {"num_clients": 5},
        "train/3.npz",
        "config.json says num_clients = 5)",
    ),
    "nothing": ((), None, {}, "train/0.npz", "train/ has none; test/ has none)"),
    "nothing, and told": (
        (),
        None,
        {"num_clients": 2},
        "train/0.npz",
        "config.json says num_clients = 2)",
    ),
    "no test": (range(2), (), {}, "test/0.npz", "test/ has none)"),
    "leading zeros": (
        ("00", "01", "02"),
        None,
        {},
        "train/0.npz",
        "train/00.npz, train/01.npz, train/02.npz are not num",
    ),
}


@pytest.mark.parametrize("clients, test, about, missing, seen", GAPS.values(), ids=GAPS)
def test_a_client_that_is_missing_is_named_and_what_is_there(
    tmp_path, clients, test, about, missing, seen
):
    line = refused(put(tmp_path, clients, test, **about))
    assert (
        f"there is no {tmp_path / missing}; give a folder dataset/NAME of PFLlib" in line
        and seen in line
    )
    assert line.endswith("put back what is missing, or make the folder anew")


def test_files_that_are_left_over_are_named(tmp_path):
    line = refused(put(tmp_path, range(7), num_clients=4))
    seen = (
        "files 4 to 6 are left over (train/ has 0 to 6; test/ has 0 to 6; config.json says "
        "num_clients = 4)"
    )
    assert seen in line and line.endswith(
        "if they are of an earlier partition, or correct config.json"
    )
    assert "files 3 to 4 are left over (train/ has 0 to 2; test/ has 0 to 4" in refused(
        put(tmp_path / "b", range(3), range(5), num_clients=3)
    )


@pytest.mark.parametrize("name", ["02", "client_3", "-1", "1.5", "\u0663", "3 (copy)"])
def test_a_file_that_is_not_numbered_is_named(tmp_path, name):
    put(tmp_path)
    put(tmp_path, [name], test=())
    assert f"train/{name}.npz is not numbered as 0.npz, 1.npz ... are; rename or remove" in refused(
        tmp_path
    )


def test_hidden_and_other_files_are_no_clients(tmp_path):
    put(tmp_path, num_clients=3)
    for name in ("._0.npz", ".DS_Store", "notes.txt"):
        (tmp_path / "train" / name).touch()
    assert len(set(reading(tmp_path).owners[0].tolist())) == 3


# --- Which classes


@pytest.mark.parametrize(
    "labels, about, why",
    [
        (
            range(1, 5),
            {},
            'classes are 1 to 4; classes count from 0: lower each y, or say "num_classes": 5',
        ),
        (
            range(1, 5),
            {"num_classes": 4},
            "classes are 1 to 4, and config.json says num_classes = 4; classes count from 0",
        ),
        ((1, 3), {}, "classes are 1, 3; classes count from 0"),
        ((2, 3), {}, "classes are 2 to 3; classes count from 0"),
        (
            range(5),
            {"num_classes": 4},
            "classes are 0 to 4, and config.json says num_classes = 4; correct config.json",
        ),
        (
            (0, 9),
            {"num_classes": 4},
            "classes are 0, 9, and config.json says num_classes = 4; correct config.json, or the",
        ),
    ],
)
def test_classes_that_do_not_count_from_0_are_refused(tmp_path, labels, about, why):
    assert why in refused(put(tmp_path, labels=labels, **about))


def test_classes_without_samples_are_as_config_says_or_told(tmp_path):
    for labels, classes in ((range(1, 5), 5), (range(4), 9), ((0, 2), 3)):
        found = reading(put(tmp_path / str(classes), labels=labels, num_classes=classes))
        assert found.classes == classes and found.hints == ()
    found = reading(put(tmp_path / "none", labels=(0, 1, 5)))
    assert found.classes == 6 and found.hints == (
        f"data.root = {tmp_path / 'none'}: classes 2 to 4 of 6 have no sample",
    )


@pytest.mark.parametrize(
    "y, seen",
    [
        (np.arange(6) / 2, "y [6] of float64"),
        (np.arange(6).astype(np.float32), "y [6] of float32"),
        (np.arange(6) > 2, "y [6] of bool"),
        (np.array(list("abcdef")), "y [6] of <U1"),
        (np.arange(6).reshape(6, 1), "y [6, 1] of int64"),
    ],
)
def test_labels_that_are_no_integers_are_refused_with_the_file(tmp_path, y, seen):
    put(tmp_path)
    np.savez(tmp_path / "train" / "1.npz", x=np.zeros((6, 1, 2, 3), np.uint8), y=y)
    assert (
        "train/1.npz has " in (line := refused(tmp_path))
        and seen in line
        and "images [n, 1 or 3, H, W]" in line
    )


# --- config.json, and pixels


@pytest.mark.parametrize(
    "about, why",
    [
        ({"num_clients": "3"}, 'has num_clients = "3"; it must be a whole number above 0'),
        ({"num_clients": 0}, "has num_clients = 0; it must be"),
        ({"num_clients": True}, "has num_clients = true; it must be"),
        ({"num_classes": 4.5}, "has num_classes = 4.5; it must be"),
        ({"mean": 0.5}, "has mean = 0.5; it must list a number per channel"),
        ({"std": ["a"]}, 'has std = ["a"]; it must list a number per channel'),
        (
            {"mean": [0.5, 0.5, 0.5]},
            "config.json has mean and std of 3 and 1 channels, the images have 1",
        ),
    ],
)
def test_what_config_cannot_mean_is_refused(tmp_path, about, why):
    assert why in refused(put(tmp_path, **about))


@pytest.mark.parametrize(
    "dtype", [np.uint16, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64]
)
@pytest.mark.parametrize("top", [1, 4095, 65535])
def test_pixels_that_were_never_normalised_are_not_guessed_at(tmp_path, dtype, top):
    put(tmp_path)
    x = (
        np.linspace(0, 1, 36).reshape(6, 1, 2, 3) * min(top, 60000 if dtype == np.float16 else top)
    ).astype(dtype)
    np.savez(tmp_path / "train" / "1.npz", x=x, y=np.arange(6) % 4)
    assert "train/1.npz are no bytes normalised with mean 0.5" in refused(tmp_path)


def test_bytes_stay_bytes(tmp_path):
    assert torch.equal(
        reading(put(tmp_path)).train.x.unique(), torch.tensor([7], dtype=torch.uint8)
    )
