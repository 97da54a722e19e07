"""Folders of image files: every kind is read by one range for all files, or refused with the file's
name.
"""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from runs import TINY

from fedlora_mpi.cli import main
from fedlora_mpi.core.vision import import_torchvision
from fedlora_mpi.data.datasets import load
from fedlora_mpi.data.source import Source

CLASSES = ("ant", "bee")


def pixels(number, *shape):
    return np.random.RandomState(number).randint(0, 256, shape or (6, 5), dtype=np.uint8)


def write(root, save, ending="png", classes=CLASSES, each=2):
    """Two images of each class in train/ and in test/; ``save(path, number)`` writes one."""
    for s, side in enumerate(("train", "test")):
        for c, name in enumerate(classes):
            for i in range(each):
                path = root / side / name / f"{i}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                save(path, 100 * s + 10 * c + i)


def grey(number):
    return np.stack([pixels(number)] * 3)


def read(root, **more):
    return load(Source("folder", root=str(root), **more))


def refused(root, **more):
    """The one line that is said."""
    with pytest.raises(ValueError) as error:
        read(root, **more)
    assert "\n" not in str(error.value) and str(root) in str(error.value)
    return str(error.value)


def png16(path, values):
    """A PNG with 16 bits a channel, [H, W, 3], which Pillow cannot write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def part(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", head)
        + part(b"IDAT", zlib.compress(rows))
        + part(b"IEND", b"")
    )


# --- Of 8 bits: as before, as torchvision and Pillow read them


@pytest.mark.parametrize(
    "mode, ending",
    [
        *((mode, "png") for mode in ("1", "L", "P", "LA", "RGB", "RGBA")),
        *((mode, "jpg") for mode in ("L", "RGB", "CMYK")),
        *((mode, "tif") for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")),
        *(("RGB", ending) for ending in ("bmp", "webp", "ppm", "JPEG", "TIFF")),
        ("L", "pgm"),
    ],
)
def test_images_of_8_bits_are_those_of_torchvision(tmp_path, mode, ending):
    def save(path, number):
        image = Image.fromarray(pixels(number, 6, 5, 4), "RGBA")
        image = image.convert("RGB") if mode not in ("RGBA", "LA") else image
        if mode == "LAB":
            image = Image.fromarray(pixels(number, 6, 5, 3), "LAB")
        image.convert(mode).save(path)

    write(tmp_path, save, ending)
    found = read(tmp_path)
    for side, name in ((found.train, "train"), (found.test, "test")):
        expected = import_torchvision().datasets.ImageFolder(tmp_path / name)
        assert side.y.tolist() == expected.targets == [0, 0, 1, 1]
        for x, (image, _) in zip(side.x, expected, strict=True):
            assert np.array_equal(x.permute(1, 2, 0), np.asarray(image.convert("RGB")))
    assert found.class_names == CLASSES and found.hints == ()


# --- Of more bits


WIDE = {
    "16-bit PNG": ("png", lambda x: x.astype(np.uint16) * 257),
    "16-bit TIFF": ("tif", lambda x: x.astype(np.uint16) * 257),
    "10 bits in a 16-bit PNG": ("png", lambda x: np.rint(x / 255 * 1023).astype(np.uint16)),
    "12 bits in a 16-bit TIFF": ("tiff", lambda x: np.rint(x / 255 * 4095).astype(np.uint16)),
    "8 bits in a 16-bit PNG": ("png", lambda x: x.astype(np.uint16)),
    "8 bits in a 32-bit TIFF": ("tif", lambda x: x.astype(np.int32)),
    "16 bits in a 32-bit TIFF": ("tif", lambda x: x.astype(np.int32) * 257),
    "fractions in a float TIFF": ("tif", lambda x: (x / 255).astype(np.float32)),
    "bytes in a float TIFF": ("tif", lambda x: x.astype(np.float32)),
    "16 bits in a float TIFF": ("tif", lambda x: x.astype(np.float32) * 257),
    "big-endian 16-bit TIFF": ("tif", lambda x: (x.astype(np.uint16) * 257).astype(">u2")),
}


@pytest.mark.parametrize("ending, of_bytes", WIDE.values(), ids=WIDE)
def test_an_image_of_more_bits_is_that_of_8_bits(tmp_path, ending, of_bytes):
    write(
        tmp_path,
        lambda path, number: Image.fromarray(of_bytes(pixels(number, 16, 16))).save(path),
        ending,
    )
    found = read(tmp_path)
    for row, number in enumerate((0, 1, 10, 11)):
        assert np.array_equal(found.train.x[row], np.stack([pixels(number, 16, 16)] * 3)), (
            "to the bit"
        )
    assert (
        len(found.hints) == 1
        and " became 0..255 in 8 of the files, which have more than 8 " in found.hints[0]
    )
    assert read(tmp_path, image_size=3).train.x.shape == (4, 3, 3, 3)


def test_a_portable_grey_map_of_16_bits_is_read(tmp_path):
    def save(path, number):
        path.write_bytes(
            b"P5 5 6 65535\n" + (pixels(number).astype(">u2") * 257).astype(">u2").tobytes()
        )

    write(tmp_path, save, "pgm")
    assert np.array_equal(read(tmp_path).train.x[2], grey(10))


def test_no_image_is_stretched_by_its_own_extremes(tmp_path):
    def bright(number):
        return 30000 + 100 * pixels(number).astype(np.uint16)

    def dark(number):
        return 20 * pixels(number).astype(np.uint16)

    write(tmp_path, lambda path, n: Image.fromarray((bright if n % 2 else dark)(n)).save(path))
    found = read(tmp_path)
    for row, values in enumerate((dark(0), bright(1), dark(10), bright(11))):
        assert np.array_equal(found.train.x[row, 0], np.rint(values / 257))


def test_a_wide_test_image_sets_the_range_of_both_sides(tmp_path):
    write(
        tmp_path,
        lambda path, n: Image.fromarray(
            pixels(n).astype(np.uint16) * (257 if n >= 100 else 10)
        ).save(path),
    )
    assert np.array_equal(read(tmp_path).train.x[0, 0], np.rint(pixels(0) * 10.0 / 257))


BEYOND = {
    "negative": (np.int32, lambda x: x.astype(np.int32) - 3, "values from -3 to "),
    "32 bits": (np.int32, lambda x: x.astype(np.int32) * 2**23, "values from 0 to 2"),
    "floats above 1": (np.float32, lambda x: x.astype(np.float32) / 200, "not whole numbers"),
    "z-scores": (np.float32, lambda x: (x.astype(np.float32) - 128) / 70, "not whole numbers"),
    "not a number": (
        np.float32,
        lambda x: np.where(x == x.max(), np.nan, x / 255),
        "from nan to nan",
    ),
    "infinity": (np.float32, lambda x: np.where(x == x.max(), np.inf, x), "to inf"),
}


@pytest.mark.parametrize("dtype, spoil, why", BEYOND.values(), ids=BEYOND)
def test_values_without_a_place_in_a_byte_are_refused_with_the_file(tmp_path, dtype, spoil, why):
    def base(number):
        return np.where(np.arange(30).reshape(6, 5) == 0, 0, pixels(number))

    write(
        tmp_path,
        lambda path, n: Image.fromarray(
            (spoil(base(n)) if n == 11 else base(n)).astype(dtype)
        ).save(path),
        "tif",
    )
    line = refused(tmp_path)
    assert (
        why in line
        and "train/bee/1.tif has" in line
        and line.endswith("save it with 8 bits a channel")
    )


def test_fractions_beside_larger_numbers_are_refused(tmp_path):
    def values(n):
        return pixels(n) / np.float32(1 if n == 11 else 255)

    write(tmp_path, lambda path, n: Image.fromarray(values(n).astype(np.float32)).save(path), "tif")
    assert (
        "train/ant/0.tif has floats from 0 to 1, " in (line := refused(tmp_path))
        and "train/bee/1.tif" in line
    )


def test_an_image_that_would_become_constant_is_refused(tmp_path):
    def dim(n):
        return pixels(n).astype(np.uint16) * 257 if n != 11 else pixels(n).astype(np.uint16) // 4

    write(tmp_path, lambda path, n: Image.fromarray(dim(n)).save(path))
    assert (
        "train/bee/1.png has values from " in (line := refused(tmp_path))
        and "which are one in the 256 steps" in line
    )


def test_a_constant_image_stays_what_it_is(tmp_path):
    write(
        tmp_path,
        lambda path, n: Image.fromarray(np.full((6, 5), 257 * (n + 9), np.uint16)).save(path),
    )
    assert read(tmp_path).train.x[:, 0, 0, 0].tolist() == [9, 10, 19, 20]
    write(tmp_path, lambda path, n: Image.new("RGBA", (5, 6), (n, 2, 3, 255)).save(path))
    assert read(tmp_path).train.x[:, 0, 0, 0].tolist() == [0, 1, 10, 11]


def test_what_only_transparency_shows_is_refused(tmp_path):
    def shape(n):
        return np.dstack([np.zeros((6, 5, 3), np.uint8), pixels(n)])

    write(tmp_path, lambda path, n: Image.fromarray(shape(n), "RGBA").save(path))
    assert "train/ant/0.png shows something as RGBA, of which RGB has one colour" in refused(
        tmp_path
    )
    write(tmp_path, lambda path, n: Image.fromarray(shape(n)[:, :, 2:], "LA").save(path))
    assert "train/ant/0.png shows something as LA" in refused(tmp_path)


def test_colours_of_16_bits_are_read_by_their_higher_8(tmp_path):
    write(tmp_path, lambda path, n: png16(path, pixels(n, 6, 5, 3).astype(int) * 257))
    assert np.array_equal(read(tmp_path).train.x[1].permute(1, 2, 0), pixels(1, 6, 5, 3))
    write(tmp_path, lambda path, n: png16(path, pixels(n, 6, 5, 3).astype(int) * 16))
    assert "use the lower 12 bits alone" in refused(tmp_path)
    write(tmp_path, lambda path, n: png16(path, pixels(n, 6, 5, 3).astype(int)))
    assert "train/ant/0.png shows something in the lower 8 of its 16 bits" in refused(tmp_path)


# --- Orientation, frames, damage


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, ending):
    turn = {
        1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, 1), 7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"lossless": True} if ending == "webp" else {}

    def stored(n):
        return Image.fromarray(np.ascontiguousarray(turn(pixels(n, 6, 5, 3))))

    write(tmp_path, lambda path, n: stored(n).save(path, exif=exif, **more), ending)
    assert np.array_equal(read(tmp_path).train.x[1].permute(1, 2, 0), pixels(1, 6, 5, 3))


def test_orientation_of_16_bits_and_of_a_jpeg_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6

    def stored(n):
        return np.rot90(pixels(n)).astype(np.uint16) * 257

    write(
        tmp_path,
        lambda path, n: Image.fromarray(np.ascontiguousarray(stored(n))).save(path, exif=exif),
    )
    assert np.array_equal(read(tmp_path).train.x[1], grey(1))
    write(
        tmp_path,
        lambda path, n: Image.fromarray(pixels(n, 5, 6)).save(path, format="JPEG", exif=exif),
    )
    assert read(tmp_path).train.x.shape == (4, 3, 6, 5)


@pytest.mark.parametrize("ending, kind", [("webp", "WEBP"), ("jpg", "JPEG")])
@pytest.mark.parametrize("at", range(0, 26, 3))
def test_damaged_notes_beside_whole_pixels_do_no_harm(tmp_path, recwarn, ending, kind, at):
    def save(path, number):
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x010F] = "a camera"
        Image.fromarray(pixels(number)).save(buffer, kind, exif=exif)
        raw = bytearray(buffer.getvalue())
        raw[raw.find(b"MM\0*") + at] ^= 0x7F
        path.write_bytes(bytes(raw))

    write(tmp_path, save, ending)
    assert read(tmp_path).train.x.shape == (4, 3, 6, 5) and not recwarn.list


@pytest.mark.parametrize(
    "ending, kind", [("png", "GIF"), ("webp", "WEBP"), ("tif", "TIFF"), ("png", "PNG")]
)
def test_of_several_images_in_a_file_the_first_is_read_and_that_is_said(tmp_path, ending, kind):
    def save(path, number):
        first, more = (Image.fromarray(pixels(n)) for n in (number, 7))
        first.save(
            path,
            kind,
            save_all=True,
            append_images=[more],
            **({"lossless": True} if kind == "WEBP" else {}),
        )

    write(tmp_path, save, ending)
    found = read(tmp_path)
    assert np.array_equal(found.train.x[2], grey(10))
    first = tmp_path / "train" / "ant" / f"0.{ending}"
    said = f"the first image is read of 8 of the files, which hold several (first: {first})"
    assert found.hints == (f"data.root: {said}",)


SPOILT = {
    "truncated JPEG": ("jpg", lambda raw: raw[: len(raw) // 2]),
    "truncated PNG": ("png", lambda raw: raw[: len(raw) // 2]),
    "truncated TIFF": ("tif", lambda raw: raw[: len(raw) // 2]),
    "empty": ("png", lambda raw: b""),
    "text": ("jpg", lambda raw: b"no image"),
}


@pytest.mark.parametrize("ending, spoil", SPOILT.values(), ids=SPOILT)
def test_a_damaged_file_is_named(tmp_path, ending, spoil):
    write(tmp_path, lambda path, n: Image.fromarray(pixels(n, 60, 50, 3)).save(path), ending)
    bad = tmp_path / "test" / "bee" / f"0.{ending}"
    bad.write_bytes(spoil(bad.read_bytes()))
    assert f"{bad} is no image, or damaged (" in refused(tmp_path)


def test_a_bomb_and_a_link_to_nothing_are_named(tmp_path, monkeypatch):
    write(tmp_path, lambda path, n: Image.fromarray(pixels(n)).save(path))
    (tmp_path / "train" / "bee" / "2.png").symlink_to("nowhere.png")
    assert "2.png is no image, or damaged ([Errno 2]" in refused(tmp_path)
    (tmp_path / "train" / "bee" / "2.png").unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "0.png is no image, or damaged (Image size" in refused(tmp_path)


# --- What is a class, and what is read


def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path):
    write(tmp_path, lambda path, n: Image.fromarray(pixels(n)).save(path))
    for side in ("train", "test"):
        for name in (".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir", "ant/.ipynb_checkpoints"):
            (tmp_path / side / name).mkdir()
            Image.fromarray(pixels(1)).save(tmp_path / side / name / "0.png")
        for name in (".DS_Store", "ant/.DS_Store", "ant/._0.png"):
            (tmp_path / side / name).write_bytes(b"\0\5\x16\7")
    found = read(tmp_path)
    assert (
        found.class_names == CLASSES
        and found.train.y.tolist() == [0, 0, 1, 1]
        and found.hints == ()
    )


def test_files_that_are_not_read_are_counted(tmp_path):
    write(tmp_path, lambda path, n: Image.fromarray(pixels(n)).save(path))
    for name in ("ant/a.heic", "ant/b.HEIC", "bee/x.npy", "bee/notes", "bee/.c.png", "d.png"):
        (tmp_path / "train" / name).touch()
    (hint,) = read(tmp_path).hints
    what = "2 .heic, 1 .npy, 1 beside the folders of the classes, 1 hidden, 1 without an ending"
    assert f"files not read: {what}; images are what ends in .jpg " in hint


def test_classes_are_sorted_by_code_points_and_images_by_path(tmp_path):
    names = ("Zebra", "apple", "10", "9", "école", "_x")
    write(tmp_path, lambda path, n: Image.fromarray(pixels(n)).save(path), classes=names)
    (tmp_path / "train" / "9" / "deep" / "er").mkdir(parents=True)
    Image.fromarray(pixels(77)).save(tmp_path / "train" / "9" / "deep" / "er" / "a.png")
    found, expected = read(tmp_path), import_torchvision().datasets.ImageFolder(tmp_path / "train")
    assert (
        list(found.class_names) == expected.classes == ["10", "9", "Zebra", "_x", "apple", "école"]
    )
    assert found.train.y.tolist() == expected.targets and np.array_equal(found.train.x[4], grey(77))


def test_a_class_may_be_a_link_and_a_link_upwards_is_not_followed(tmp_path):
    write(tmp_path / "data", lambda path, n: Image.fromarray(pixels(n)).save(path))
    (tmp_path / "data" / "train" / "bee").rename(tmp_path / "elsewhere")
    (tmp_path / "data" / "train" / "bee").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    found = read(tmp_path / "data")
    assert found.train.y.tolist() == [0, 0, 1, 1] and np.array_equal(found.train.x[3], grey(11))


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_class_without_images_is_refused(tmp_path, side):
    write(tmp_path, lambda path, n: Image.fromarray(pixels(n)).save(path))
    for name in ("train", "test"):
        (tmp_path / name / "cow").mkdir()
        (tmp_path / name / "cow" / "0.gif").touch()
    Image.fromarray(pixels(1)).save(
        tmp_path / ("test" if side == "train" else "train") / "cow" / "0.png"
    )
    assert f"{side}/cow holds no image; each folder in " in refused(tmp_path)


def test_a_folder_without_classes_is_refused(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels(1)).save(tmp_path / name / "0.png")
    assert "train holds no folder of a class; expected are " in refused(tmp_path)


@pytest.mark.parametrize(
    "pair", [("Cat", "cat"), ("01", "1"), ("cat", "cat "), ("e\u0301", "\u00e9"), ("a_b", "a b")]
)
def test_classes_that_look_alike_are_told(tmp_path, pair):
    write(tmp_path, lambda path, n: Image.fromarray(pixels(n)).save(path), classes=pair)
    found = read(tmp_path)
    assert found.classes == 2
    names = " and ".join(map(repr, sorted(pair)))
    assert found.hints == (
        f"data.root = {tmp_path}: {names} are different classes; write them alike where they are "
        "one",
    )


def test_partition_and_run_name_the_classes_and_say_what_is_odd(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path / "mine",
        lambda path, n: Image.fromarray(pixels(n, 8, 8)).save(path),
        classes=("Cat", "cat"),
        each=8,
    )
    (tmp_path / "mine" / "train" / "Cat" / "a.heic").touch()
    mine = [
        "data.dataset=folder",
        "data.root=mine",
        "data.partition={kind: iid, clients: 2, train: 0, test: 0}",
    ]
    assert main(["partition", str(TINY), *mine]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-3] == "classes: 0 Cat, 1 cat"
    begin = f"hint: {TINY}: data.root = mine: "
    err = [line for line in told.err.splitlines() if " resets " not in line]
    assert [line.startswith(begin) for line in err] == [True, True]
    assert main(["run", str(TINY), *mine, "rounds=1", f"output={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().err.count(begin) == 2


# --- Tiny ImageNet


def tiny(root):
    home = root / "tiny-imagenet-200"
    for c, name in enumerate(("n1", "n2")):
        (home / "train" / name / "images").mkdir(parents=True)
        for i in range(2):
            Image.fromarray(pixels(10 * c + i)).save(home / "train" / name / "images" / f"{i}.png")
    (home / "val" / "images").mkdir(parents=True)
    Image.fromarray(pixels(50)).save(home / "val" / "images" / "v.png")
    (home / "val" / "val_annotations.txt").write_text("v.png\tn2\t0\t0\t9\t9\n")
    return home


def test_hidden_files_are_no_part_of_tiny_imagenet(tmp_path):
    home = tiny(tmp_path)
    (home / "train" / ".git").mkdir()
    (home / "train" / "n1" / "images" / "._0.png").write_bytes(b"\0")
    found = load(Source("tiny_imagenet", root=str(tmp_path)))
    assert (
        found.class_names == ("n1", "n2")
        and found.train.y.tolist() == [0, 0, 1, 1]
        and found.test.y.tolist() == [1]
    )


@pytest.mark.parametrize("line", ["v.png\tn3\n", "v.png\n", "\n"])
def test_a_line_of_the_annotations_is_named(tmp_path, line):
    home = tiny(tmp_path)
    (home / "val" / "val_annotations.txt").write_text("v.png\tn1\n" + line)
    with pytest.raises(
        ValueError, match="val_annotations.txt: line 2: must name an image and a class of train/"
    ):
        load(Source("tiny_imagenet", root=str(tmp_path)))
