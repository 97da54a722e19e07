"""CSV files of texts: odd rows, labels and bytes are said with file and line, and no row is lost in
silence.
"""

import pytest
from runs import TINY

from fedlora_mpi.cli import main
from fedlora_mpi.data.csv_texts import read_csv
from fedlora_mpi.data.datasets import load
from fedlora_mpi.data.labels import similar_labels
from fedlora_mpi.data.source import Source
from fedlora_mpi.data.texts import Text

pytest.importorskip("tokenizers")

ROWS = ("sports,goal match", "business,stock profit", "sports,team coach", "business,market bank")
SETTINGS = Text(label="label", columns=("text",))


def put(root, train=ROWS, test=ROWS, header="label,text", end="\n"):
    """Two files of these lines."""
    for name, lines in (("train.csv", train), ("test.csv", test)):
        (root / name).write_bytes(end.join([header, *lines, ""]).encode())
    return root


def reading(root, settings=SETTINGS):
    return read_csv(str(root), settings)


def refused(root, settings=SETTINGS):
    """The one line that is said."""
    with pytest.raises(ValueError) as error:
        reading(root, settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Rows


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_ends_of_lines_and_a_byte_order_mark_change_nothing(tmp_path, end, mark, last):
    put(tmp_path, end=end)
    for name in ("train.csv", "test.csv"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(mark + (content if last else content.rstrip(b"\r\n")))
    found = reading(tmp_path)
    assert (
        found.class_names == ("business", "sports")
        and found.train.y == [1, 0, 1, 0]
        and found.hints == ()
    )
    assert found.test.texts == ["goal match", "stock profit", "team coach", "market bank"]


BROKEN = {
    "never closed": ('sports,"goal', "line 3: a quotation mark opens here and never closes"),
    "never closed, in the label": (
        '"sports,goal',
        "line 3: a quotation mark opens here and never closes",
    ),
    "text after a closing mark": (
        'sports,"goal" match',
        "line 3: text follows a closing quotation mark",
    ),
    "marks with backslashes": (
        r'sports,"he said \"goal\" now"',
        "line 3: text follows a closing quotation mark",
    ),
    "NUL": ("sports,go\0al", "line 3: holds a NUL byte"),
    "too few": ("sports", "line 3: has 1 fields, the first row 2"),
    "too many": ("sports,goal,match", "line 3: has 3 fields, the first row 2"),
    "no label": (",goal", "line 3: has no label in column label; give it one, or remove the row"),
    "blank label": ("  \t,goal", "line 3: has no label in column label"),
    "commas alone": (",", "line 3: has no label in column label"),
    "blanks alone": ("  ", "line 3: has 1 fields"),
}


@pytest.mark.parametrize("row, why", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("side", ["train", "test"])
def test_an_odd_row_is_refused_with_file_and_line(tmp_path, row, why, side):
    put(tmp_path, **{side: (ROWS[0], row, *ROWS[1:])})
    line = refused(tmp_path)
    assert line.startswith(f"text.{side} = {side}.csv: ") and why in line


def test_a_mark_that_is_closed_in_a_later_quoted_text_is_refused(tmp_path):
    put(tmp_path, train=(ROWS[0], 'sports,"goal', ROWS[1], 'business,"stock, profit"', ROWS[2]))
    assert "line 3: text follows a closing quotation mark" in refused(tmp_path)


def test_two_open_marks_that_swallow_whole_rows_are_told(tmp_path):
    put(tmp_path, train=(ROWS[0], 'sports,"goal', *ROWS[1:3], 'business,stock"', ROWS[3]))
    found = reading(tmp_path)
    assert len(found.train.y) == 3
    hint = (
        "text.train = train.csv: line 3: 3 lines within this text look like rows; is a quotation "
        "mark open?"
    )
    assert found.hints == (hint,)
    put(tmp_path, train=(*ROWS, 'sports,"two\nlines, of a text"'))
    assert reading(tmp_path).hints == ()


@pytest.mark.parametrize("ahead", [0, 3, 20000])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_that_is_not_in_utf8_is_named(tmp_path, ahead, end):
    put(tmp_path, train=(*(ROWS[0] for _ in range(ahead)), "sports,M?nchen"), end=end)
    (tmp_path / "train.csv").write_bytes(
        (tmp_path / "train.csv").read_bytes().replace(b"?", b"\xfc")
    )
    assert (
        f"after line {ahead + 1} (line {ahead + 2}: invalid start byte); save it in UTF-8"
        in refused(tmp_path)
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_unicode_is_refused(tmp_path, encoding):
    put(tmp_path)
    (tmp_path / "train.csv").write_bytes((tmp_path / "train.csv").read_text().encode(encoding))
    assert "text.train = train.csv: is no CSV file in UTF-8 after line 0 (line 1: " in refused(
        tmp_path
    )


def test_a_row_after_a_text_of_several_lines_has_its_own_number(tmp_path):
    put(tmp_path, train=('sports,"goal\n\nmatch"', "", "sports"))
    assert "line 6: has 1 fields" in refused(tmp_path)


def test_a_long_text_is_read(tmp_path):
    put(tmp_path, train=(*ROWS, f"sports,{'goal ' * 40000}"))
    assert len(reading(tmp_path).train.texts[-1]) == 200000


def test_empty_texts_are_told(tmp_path):
    put(tmp_path, train=(ROWS[0], "sports,", "sports,  ", ROWS[1]))
    assert reading(tmp_path).hints == ("text.train = train.csv: 2 texts are empty (first: line 3)",)


# --- Columns


def test_a_file_without_names_of_columns_or_with_one_twice_is_refused(tmp_path):
    put(tmp_path, header=ROWS[0])
    assert refused(tmp_path).endswith(
        "label: train.csv has no such column; there are sports, goal match"
    )
    put(tmp_path, train=("sports,a,b",), test=("sports,a,b",), header="label,text,text")
    assert (
        refused(tmp_path)
        == "text.train = train.csv: line 1: names the column text 2 times; name it once"
    )
    put(tmp_path, header='"a\nb",text')
    assert "there are a b, text" in refused(tmp_path)


def test_blanks_around_names_of_columns_do_not_matter(tmp_path):
    put(tmp_path, header=" label , text")
    assert reading(tmp_path).train.y == [1, 0, 1, 0]


@pytest.mark.parametrize("side", ["train", "test"])
@pytest.mark.parametrize(
    "content, why",
    [(b"", "is empty, in "), (b"\n\n", "is empty, in "), (b"label,text\n", "has no row")],
)
def test_a_file_without_rows_is_refused(tmp_path, side, content, why):
    put(tmp_path)
    (tmp_path / f"{side}.csv").write_bytes(content)
    assert f"text.{side} = {side}.csv: {why}" in refused(tmp_path)


# --- Labels


@pytest.mark.parametrize("label", ["sports ", " sports", "\tsports", "sports\u00a0", '"sports "'])
def test_blanks_around_a_label_do_not_make_a_class(tmp_path, label):
    put(tmp_path, train=(*ROWS, f"{label},goal"), test=(f"{label},goal",))
    found = reading(tmp_path)
    assert (
        found.class_names == ("business", "sports")
        and found.train.y[-1] == found.test.y[0] == 1
        and found.hints == ()
    )


ALIKE = [
    ("1", "01"), ("1", "1.0"), ("1", "+1"), ("1", "\uff11"), ("-2", "-02"), ("Sports", "sports"), ("SPORTS", "sports"),
    ("caf\u00e9", "cafe\u0301"), ("stra\u00dfe", "STRASSE"), ("ice hockey", "ice  hockey"), ("sci_tech", "sci-tech"),
    ("sports", "spo\u200brts"), ("\ufb01sh", "fish"),
]  # fmt: skip


@pytest.mark.parametrize("pair", ALIKE)
def test_labels_that_look_alike_are_told_in_one_line(tmp_path, pair):
    put(tmp_path, train=(*ROWS, *(f"{label},goal" for label in pair)))
    (hint,) = reading(tmp_path).hints
    names = " and ".join(map(repr, sorted(pair)))
    assert (
        hint
        == f"text.train = train.csv: {names} are different classes; write them alike where they "
        "are one"
    )


def test_different_labels_are_not_alike():
    assert (
        similar_labels(
            ["-2", "2", "c", "c++", "c#", "1", "10", "1.5", "a", "b", "sports", "sport", "", "0"]
        )
        == []
    )
    assert similar_labels(["2", "02", "B", "b", "c"]) == [["02", "2"], ["B", "b"]]


def test_many_alike_labels_are_one_line(tmp_path):
    put(
        tmp_path,
        train=[f"{zero}{n},goal" for n in range(1, 6) for zero in ("", "0")],
        test=("1,goal",),
    )
    (hint,) = reading(tmp_path).hints
    assert "'03' and '3', and 2 more such groups are different" in hint


def test_numbers_that_are_equal_are_sorted_alike_everywhere(tmp_path):
    put(tmp_path, train=[f"{n},goal" for n in ("10", "1", "-2", "01", "001")], test=("1,goal",))
    assert reading(tmp_path).class_names == ("-2", "001", "01", "1", "10")
    put(tmp_path, train=[f"{n},goal" for n in ("10", "--2", "9")], test=("9,goal",))
    assert reading(tmp_path).class_names == ("--2", "10", "9")


def test_a_label_of_the_test_file_alone_is_refused_with_its_line(tmp_path):
    put(tmp_path, test=(*ROWS[:2], "Sports,goal"))
    there = "the label 'Sports' is not in train.csv; there are business, sports"
    assert refused(tmp_path) == f"text.test = test.csv: {there}; it is in line 4"


def test_a_label_of_several_lines_is_said_in_one(tmp_path):
    put(tmp_path, train=(*ROWS, '"two\nlines",goal'), test=('"other\nlines",goal',))
    assert "there are business, sports, two lines; it is" in refused(tmp_path)


# --- What the user sees


def test_partition_names_the_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, train=[*ROWS, "Sports,a", '"a label, too\nlong for a line of text",b'] * 2)
    data = [
        "data={dataset: csv, root: ., text: {length: 4}, partition: {kind: iid, clients: 2, train: 0, test: 0}}",
        "model={name: transformer, width: 4, heads: 1, layers: 1, feedforward: 4}",
    ]
    assert main(["partition", str(TINY), *data]) == 0
    told = capsys.readouterr()
    assert (
        "classes: 0 Sports, 1 a label, too long for a…, 2 business, 3 sports"
        in told.out.splitlines()
    )
    hint = (
        "data.text.train = train.csv: 'Sports' and 'sports' are different classes; write them "
        "alike where they are one"
    )
    err = [line for line in told.err.splitlines() if " resets " not in line]
    assert err == [f"hint: {TINY}: {hint}"]


def test_ag_news_has_its_names_and_is_read_strictly(tmp_path):
    folder = tmp_path / "AG_NEWS"
    folder.mkdir()
    for name in ("train.csv", "test.csv"):
        (folder / name).write_text('"3","a ""b""","c"\n"1","d","e"\n')
    found = load(Source("ag_news", root=str(tmp_path)))
    assert found.class_names == (
        "World",
        "Sports",
        "Business",
        "Sci/Tech",
    ) and found.train.y.tolist() == [2, 0]
    (folder / "test.csv").write_text('"3","a","c\n"1","d","e"\n')
    with pytest.raises(
        ValueError, match="text.test = test.csv: .*line 1: text follows a closing quotation mark"
    ):
        load(Source("ag_news", root=str(tmp_path)))
