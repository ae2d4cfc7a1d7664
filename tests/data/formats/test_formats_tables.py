"""Tables in CSV, Parquet and Hugging Face's folders: the same rows give the same records."""

from __future__ import annotations

import datetime
import gzip
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from format_samples import LABELS, PATIENTS, ROWS, SAMPLES, TABLE, csv_text, png, read, write_hugging_face

from conclave.base.errors import BadInputError
from conclave.data.values.kinds import group_number
from conclave.data.values.schema import ImageSchema, TableSchema, TextSchema

TABLES = ["csv", "csv, gz", "parquet", "hugging-face"]


def write_csv(folder, content, name="a.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def reasons(data):
    return {row.where: row.why for row in data.bad}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_becomes_numbers_labels_and_groups(name, tmp_path):
    path, document = SAMPLES[name](tmp_path)
    data = read(path, "group", **document)
    assert data.schema == TableSchema(features=5, classes=2)
    assert data.records["table"].dtype == torch.float32
    torch.testing.assert_close(data.records["table"], torch.tensor(ROWS))
    assert data.records["label"].tolist() == LABELS
    assert data.records["group"].tolist() == [group_number(name) for name in PATIENTS["patient"]]
    assert data.bad == ()


@pytest.mark.parametrize("name", TABLES)
def test_features_come_in_the_order_that_is_asked_for(name, tmp_path):
    path, document = SAMPLES[name](tmp_path)
    chosen = read(path, **document | {"features": ["weight", "blood"], "center": 65.25, "scale": 0.5})
    expected = [
        [(weight - 65.25) / 0.5, blood == "0", blood == "A", blood == "B"]
        for weight, blood in zip(PATIENTS["weight"], PATIENTS["blood"], strict=True)
    ]
    torch.testing.assert_close(chosen.records["table"], torch.tensor(expected))
    plain = {key: document[key] for key in ("kind", "label", "labels")}
    numbers = read(path, **plain, features=["age"])
    assert numbers.records["table"].flatten().tolist() == PATIENTS["age"]
    assert set(numbers.records) == {"table", "label"}


@pytest.mark.parametrize("kind", ["parquet", "hugging-face"])
def test_of_typed_columns_the_numbers_are_the_features_unless_said_otherwise(kind, tmp_path):
    table = PATIENTS | {
        "smokes": [True, False, True, True],
        "height": pa.array([Decimal("1.50"), Decimal("1.75"), Decimal("1.25"), Decimal("2.00")]),
        "seen": [datetime.date(2020, 1, 1)] * 4,
    }
    path = tmp_path / "a"
    if kind == "parquet":
        pq.write_table(pa.table(table), path)
    else:
        write_hugging_face(path, table)
    data = read(path, kind=kind, label="ill", labels=["no", "yes"])
    columns = zip(PATIENTS["age"], PATIENTS["weight"], [1, 0, 1, 1], [1.5, 1.75, 1.25, 2.0], strict=True)
    torch.testing.assert_close(data.records["table"], torch.tensor([list(map(float, row)) for row in columns]))


def test_of_a_csv_file_every_other_column_is_a_feature_whatever_rows_hold(tmp_path):
    """Were a column left out because one cell is no number, one row would change what all others look like."""
    good = read(write_csv(tmp_path, "a,b,y\n1,2,0\n3,4,1\n"), kind="csv", label="y", classes=2)
    odd = read(write_csv(tmp_path, "a,b,y\n1,2,0\n3,4,1\n5,six,1\n"), kind="csv", label="y", classes=2)
    assert good.schema == odd.schema == TableSchema(features=2, classes=2)
    assert torch.equal(good.records["table"], odd.records["table"])
    assert reasons(odd) == {"row 3": "column 'b' must be a finite number"}


def test_no_row_changes_what_another_gives(tmp_path):
    lines = csv_text(PATIENTS).splitlines()
    lines += ["41,,A,zoe,yes", "41,1,A,zoe", "41,1,X,zoe,yes", "41,1,A,zoe,maybe", "41,1,A,,no", "nan,1,A,zoe,no"]
    everything = read(write_csv(tmp_path, "\n".join(lines)), kind="csv", **TABLE)
    assert len(everything.bad) == 6
    for left_out in range(1, len(lines)):
        rest = read(write_csv(tmp_path, "\n".join(lines[:left_out] + lines[left_out + 1 :])), kind="csv", **TABLE)
        keep = [i for i in range(4) if i != left_out - 1]
        for name, tensor in rest.records.items():
            assert torch.equal(tensor, everything.records[name][keep])


def test_every_kind_of_bad_row_is_told_apart_and_left_out(tmp_path):
    rows = {
        "1,1,a,x,0": None,
        "?,1,a,x,0": "column 'n' is missing, must be given where missing is not set",
        "1,,a,x,0": "column 'm' is missing, must be given where missing is not set",
        "inf,1,a,x,0": "column 'n' must be a finite number",
        "1_0,1,a,x,0": "column 'n' must be a finite number",
        "0x10,1,a,x,0": "column 'n' must be a finite number",
        "1e300,1,a,x,0": "a value must be within what float32 holds",
        "1,1,c,x,0": "column 'k' must be one of its categories",
        "1,1,,x,0": "column 'k' must be one of its categories",
        "1,1,a, ,0": "the group is missing, must be given",
        "1,1,a,x,": "the label is missing, must be given",
        "1,1,a,x,2": "the label must be one of labels, or a number below classes",
        "1,1,a,x,-1": "the label must be one of labels, or a number below classes",
        "1,1,a,x": "has 4 columns, must have 5",
        "1,1,a,x,0,9": "has 6 columns, must have 5",
        "1,1,b, y ,1.0": None,
    }
    path = write_csv(tmp_path, "n,m,k,g,y\n" + "\n".join(rows) + "\n")
    data = read(path, kind="csv", label="y", classes=2, group_by="g", categories={"k": ["a", "b"]})
    expected = {f"row {number}": why for number, why in enumerate(rows.values(), start=1) if why is not None}
    assert reasons(data) == expected
    assert [row.where for row in data.bad] == list(expected)
    assert data.records["table"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 1]]
    assert data.records["label"].tolist() == [0, 1]
    assert data.records["group"].tolist() == [group_number("x"), group_number("y")]


def test_bytes_that_are_no_text_cost_their_own_row_only(tmp_path):
    path = write_csv(tmp_path, b"a,g,y\n1,x,0\n\xff,x,0\n1,\xff,0\n1,x,\xff\n\xff\n1,x,\xe9,0\n2,z,1\n")
    data = read(path, kind="csv", label="y", classes=2, group_by="g")
    assert list(reasons(data)) == [f"row {number}" for number in range(2, 7)]
    assert data.records["table"].tolist() == [[1], [2]]
    for narrow, wide in ((pa.binary(), pa.string()), (pa.large_binary(), pa.large_string())):
        column = pa.array([b"no", b"\xff", b"yes"], narrow).view(wide)  # no check: what a damaged file would hold
        pq.write_table(pa.table({"a": [1, 2, 3], "y": column}), tmp_path / "a.parquet")
        data = read(tmp_path / "a.parquet", kind="parquet", label="y", labels=["no", "yes"])
        assert reasons(data) == {"row 2": "the label must be text in UTF-8"}


def test_missing_numbers_are_a_public_constant_where_one_is_stated(tmp_path):
    path = write_csv(tmp_path, "a,b,y\n?,1,0\n4, NA ,1\n,-,1\n")
    document = {"kind": "csv", "label": "y", "classes": 2, "center": 2.0, "scale": 2.0}
    data = read(path, **document, missing=0)
    assert data.records["table"].tolist() == [[0, -0.5], [1, 0]]
    assert reasons(data) == {"row 3": "column 'b' must be a finite number"}
    data = read(path, **document, missing=-1.5, missing_values=["", "-", "?"])
    assert data.records["table"].tolist() == [[-1.5, -0.5], [-1.5, -1.5]]
    assert list(reasons(data)) == ["row 2"]


@pytest.mark.parametrize("kind", ["parquet", "hugging-face"])
def test_values_that_typed_columns_lack_are_missing_too(kind, tmp_path):
    table = {
        "a": pa.array([1.0, None, float("nan"), 4.0, 5.0]),
        "k": pa.array(["u", "u", "v", None, "u"]),
        "g": pa.array([1, 2, 3, 4, None]),
        "y": [0, 1, 1, 1, 0],
    }
    path = tmp_path / "a"
    pq.write_table(pa.table(table), path) if kind == "parquet" else write_hugging_face(path, table)
    document = {"kind": kind, "label": "y", "classes": 2, "group_by": "g"}
    data = read(path, **document, categories={"k": ["u", "v"]})
    assert [row.where for row in data.bad] == ["row 2", "row 3", "row 4", "row 5"]
    data = read(path, **document, categories={"k": ["u", "v", ""]}, missing=9)
    assert data.records["table"].tolist() == [[1, 1, 0, 0], [9, 1, 0, 0], [9, 0, 1, 0], [4, 0, 0, 1]]
    assert reasons(data) == {"row 5": "the group is missing, must be given"}


def test_labels_are_names_or_a_map_of_names_or_numbers(tmp_path):
    path = write_csv(tmp_path, "a,y\n1,0\n2,1.0\n3,4\n4, 2 \n5,5\n")
    data = read(path, kind="csv", label="y", labels={"0": 0, "1": 1, "2": 1, "3": 1, "4": 1})
    assert data.records["label"].tolist() == [0, 1, 1, 1]
    assert data.schema.classes == 2
    data = read(path, kind="csv", label="y", labels=["5", "4"])
    assert data.records["table"].flatten().tolist() == [3, 5]
    assert data.records["label"].tolist() == [1, 0]
    data = read(path, kind="csv", label="y", classes=3)
    assert data.records["label"].tolist() == [0, 1, 2]


def test_a_csv_file_may_lack_a_header_and_have_other_delimiters_and_quotes(tmp_path):
    content = csv_text(PATIENTS, header=False, delimiter=";").replace("ann", '"a""n;\nn"', 1)
    data = read(write_csv(tmp_path, content), "group", kind="csv", columns=list(PATIENTS), delimiter=";", **TABLE)
    torch.testing.assert_close(data.records["table"], torch.tensor(ROWS))
    assert int(data.records["group"][0]) == group_number('a"n;\nn')
    tabs = read(write_csv(tmp_path, csv_text(PATIENTS, delimiter="\t")), kind="csv", delimiter="\t", **TABLE)
    torch.testing.assert_close(tabs.records["table"], torch.tensor(ROWS))


def test_names_may_be_in_any_language_and_follow_a_byte_order_mark(tmp_path):
    content = "\ufeffGröße,läuft,病\n1.5,Ärger,oui\n2.5,Öl,non\n"
    document = {"kind": "csv", "label": "病", "labels": ["non", "oui"], "group_by": "läuft"}
    for given in ({"features": ["Größe"]}, {"columns": ["Größe", "läuft", "病"]}):
        rows = content if "features" in given else "\ufeff" + content.split("\n", 1)[1]
        data = read(write_csv(tmp_path, rows), **document, **given)
        assert data.records["table"].flatten().tolist() == [1.5, 2.5]
        assert data.records["label"].tolist() == [1, 0]
        assert data.records["group"].tolist() == [group_number("Ärger"), group_number("Öl")]


def test_rows_keep_their_numbers_across_blocks_and_bad_rows(tmp_path):
    """Ten times what pyarrow parses at once would take long; its block is made small instead."""
    from conclave.data.formats import csv_files

    lines = [f'{n},"\n{n % 2}\n"' if n % 97 else f"{n}" for n in range(1, 4948)]  # the last row is a bad one
    path = write_csv(tmp_path, "a,y\n" + "\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_files, "_BLOCK_BYTES", 1000)
        data = read(path, kind="csv", label="y", classes=2)
        path.write_text("\n".join(lines))
        headless = read(path, kind="csv", columns=["a", "y"], label="y", classes=2)
    for found in (data, headless):
        assert [row.where for row in found.bad] == [f"row {n}" for n in range(97, 4948, 97)]
        assert found.records["table"].flatten().tolist() == [n for n in range(1, 4948) if n % 97]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_folder_of_files_is_one_data_set(kind, tmp_path):
    folder = tmp_path / "a"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    parts = [{"x": [1, 2], "y": [0, 1]}, {"x": [3, 9], "y": [1, 7]}]
    for name, part in (("2", parts[1]), ("b/1", parts[0])):
        if kind == "csv":
            write_csv(folder, csv_text(part), f"{name}.csv")
        else:
            pq.write_table(pa.table(part), folder / f"{name}.parquet")
    (folder / "notes.md").write_text("not data")
    (folder / ".hidden" / f"1.{kind}").write_text("not data")
    (folder / f"._2.{kind}").write_text("not data")
    data = read(folder, kind=kind, label="y", classes=2)
    assert data.records["table"].flatten().tolist() == [3, 1, 2]
    assert [row.where for row in data.bad] == [f"2.{kind}, row 2"]


def test_a_folder_may_hold_packed_csv_files(tmp_path):
    write_csv(tmp_path, gzip.compress(b"x,y\n1,0\n"), "1.csv.gz")
    write_csv(tmp_path, b"x,y\n2,1\n", "2.CSV")
    assert read(tmp_path, kind="csv", label="y", classes=2).records["table"].flatten().tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["csv", "parquet", "hugging-face"])
def test_text_is_cut_into_windows_that_share_the_rows_group(kind, tmp_path):
    table = {"poem": ["abcdefgh", "ab", "ä€xy", "12345"], "poet": ["p", "p", "q", "q"], "year": [1, 2, 3, 4]}
    path = tmp_path / "a"
    if kind == "csv":
        path.write_text(csv_text(table), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.table(table), path)
    else:
        write_hugging_face(path, table)
    data = read(path, "group", kind=kind, text={"column": "poem", "window": 3}, group_by="poet")
    assert data.schema == TextSchema(window=3)
    assert data.records["text"].dtype == torch.uint8
    euro = "ä€xy".encode()
    found = [bytes(row.tolist()) for row in data.records["text"]]
    assert found == [b"abc", b"def", euro[:3], euro[3:6], b"123"]
    assert data.records["group"].tolist() == [group_number(g) for g in "ppqqq"]
    assert set(data.records) == {"text", "group"}
    assert reasons(data) == {"row 2": "must have the 3 bytes of a window at least"}


@pytest.mark.parametrize("kind", ["parquet", "hugging-face"])
@pytest.mark.parametrize("as_struct", [False, True])
def test_pictures_in_a_column_are_decoded_and_no_path_is_followed(kind, as_struct, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (6, 5)).astype(np.uint8)
    (tmp_path / "secret.png").write_bytes(png(array))
    contents = [png(array), b"no picture", None, png(array.T)]
    if as_struct:
        contents = [{"bytes": content, "path": str(tmp_path / "secret.png")} for content in contents]
    table = {"image": contents, "label": [1, 1, 0, 0]}
    path = tmp_path / "a"
    pq.write_table(pa.table(table), path) if kind == "parquet" else write_hugging_face(path, table)
    data = read(path, kind=kind, image={"column": "image", "height": 6, "width": 5}, label="label", classes=2)
    assert data.schema == ImageSchema(image=(1, 6, 5), classes=2)
    np.testing.assert_array_equal((data.records["image"][0, 0] * 255).round().numpy(), array)
    assert data.records["label"].tolist() == [1, 0]
    assert reasons(data) == {
        "row 2": "must be an undamaged picture (PNG, JPEG or BMP)",
        "row 3": "column 'image' must hold the bytes of a picture",
    }


@pytest.mark.filterwarnings("ignore")
def test_what_the_library_itself_saves_can_be_read(tmp_path):
    from datasets import Dataset, DatasetDict, Features, Value
    from datasets import Image as ImageFeature

    whole = Dataset.from_dict(PATIENTS)
    splits = DatasetDict({"train": whole.select([3, 0, 2]), "test": whole.select([1])})
    splits.save_to_disk(tmp_path / "several", num_shards={"train": 2, "test": 1})
    data = read(tmp_path / "several", kind="hugging-face", split="train", **TABLE)
    torch.testing.assert_close(data.records["table"], torch.tensor([ROWS[3], ROWS[0], ROWS[2]]))
    array = np.random.default_rng(0).integers(0, 256, (6, 5)).astype(np.uint8)
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    pictures = Dataset.from_dict({"image": [{"bytes": png(array), "path": None}], "label": [1]}, features=features)
    pictures.save_to_disk(tmp_path / "pictures")
    picture = {"column": "image", "height": 6, "width": 5}
    data = read(tmp_path / "pictures", kind="hugging-face", image=picture, label="label", classes=2)
    np.testing.assert_array_equal((data.records["image"][0, 0] * 255).round().numpy(), array)
    for split in (None, "validation", "../several/train", ".."):
        with pytest.raises(BadInputError, match=r"split must be one of those that dataset_dict.json names"):
            read(tmp_path / "several", kind="hugging-face", split=split, **TABLE)
    with pytest.raises(BadInputError, match="has no splits, split must not be given"):
        read(tmp_path / "pictures", kind="hugging-face", split="train", image=picture, label="label", classes=2)


def test_files_of_one_data_set_must_have_the_same_columns(tmp_path):
    write_hugging_face(tmp_path / "a", {"x": [1, 2], "y": [0, 1]}, shards=2)
    write_hugging_face(tmp_path / "b", {"z": [1.5, 2.5], "y": [0, 1]}, shards=2)
    name = "data-00001-of-00002.arrow"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(BadInputError, match=r"data-00001-of-00002\.arrow: has other columns.*has 'z'; lacks 'x'"):
        read(tmp_path / "a", kind="hugging-face", label="y", classes=2)
    pq.write_table(pa.table({"x": [1, 2], "y": [0, 1]}), tmp_path / "1.parquet")
    for table, found in (({"y": [0, 1], "x": [1, 2]}, "column 1 is 'y', and 'x' there"), ({"y": [0]}, "lacks 'x'")):
        pq.write_table(pa.table(table), tmp_path / "2.parquet")
        with pytest.raises(BadInputError, match=rf"2\.parquet: has other columns than 1\.parquet.*{found}"):
            read(tmp_path, kind="parquet", label="y", classes=2)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("{", "must be what save_to_disk of datasets wrote"),
        ("[]", "must be a JSON object"),
        ("{}", "must name the data set's files, all in its own folder"),
        ('{"_data_files": []}', "must name the data set's files"),
        ('{"_data_files": [{"filename": "../a.arrow"}]}', "all in its own folder"),
        ('{"_data_files": [{"filename": "/etc/passwd"}]}', "all in its own folder"),
        ('{"_data_files": [{"filename": ".."}]}', "all in its own folder"),
        ('{"_data_files": [{"filename": 3}]}', "all in its own folder"),
        ('{"_data_files": [{"filename": "missing.arrow"}]}', "must be an undamaged Arrow stream"),
        ('{"_data_files": [{"filename": "state.json"}]}', "must be an undamaged Arrow stream"),
        ("[" * 100_000, "must be what save_to_disk of datasets wrote"),
    ],
)
def test_a_folder_that_was_tampered_with_is_refused(state, expected, tmp_path):
    write_hugging_face(tmp_path / "a", PATIENTS)
    (tmp_path / "a" / "state.json").write_text(state)
    with pytest.raises(BadInputError, match=expected):
        read(tmp_path / "a", kind="hugging-face", **TABLE)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"label": "sick"}, "has 0 columns named 'sick', must have one"),
        ({"group_by": "doctor"}, "has 0 columns named 'doctor', must have one"),
        ({"features": ["age", "blood", "height"]}, "has 0 columns named 'height', must have one"),
        ({"center": {"height": 1.0}}, "center names the column 'height', must be one of its features"),
        ({"categories": {"colour": ["red"]}}, "categories names the column 'colour', must be one of its features"),
    ],
)
def test_a_column_that_is_not_there_is_one_sentence(name, change, expected, tmp_path):
    path, document = SAMPLES[name](tmp_path)
    with pytest.raises(BadInputError, match=expected):
        read(path, **document | change)


def test_columns_there_twice_or_none_left_are_refused(tmp_path):
    with pytest.raises(BadInputError, match="has 2 columns named 'a', must have one"):
        read(write_csv(tmp_path, "a,a,y\n1,2,0\n"), kind="csv", label="y", classes=2)
    with pytest.raises(BadInputError, match="has no column of features"):
        read(write_csv(tmp_path, "y\n0\n"), kind="csv", label="y", classes=2)
    write_csv(tmp_path, "a,y\n0,1\n", "b.csv")
    with pytest.raises(BadInputError, match=r"b\.csv: has other columns than a\.csv"):
        read(tmp_path, kind="csv", label="y", classes=2)


@pytest.mark.parametrize("name", TABLES)
def test_damaged_files_are_one_sentence_or_lose_rows_but_never_a_traceback(name, tmp_path):
    """Files are cut short and overwritten at random places; whatever is read has the right shape."""
    path, document = SAMPLES[name](tmp_path)
    files = [path] if path.is_file() else sorted(path.glob("*.arrow"))
    draw = np.random.default_rng(0)
    outcomes = set()
    for file in files:
        whole = file.read_bytes()
        for trial in range(60):
            content = bytearray(whole)
            if trial % 3 == 0:
                del content[draw.integers(len(content)) :]
            for place in draw.integers(len(whole), size=trial % 4):
                content[place % max(len(content), 1) : place % max(len(content), 1) + 1] = bytes([draw.integers(256)])
            file.write_bytes(content)
            try:
                data = read(path, **document)
            except BadInputError as error:
                outcomes.add("refused" if str(tmp_path) in str(error) else str(error))
            else:
                assert data.records["table"].shape[1] == 5
                assert data.records["table"].isfinite().all()
                outcomes.add("read")
        file.write_bytes(whole)
    assert {"refused"} <= outcomes <= {"refused", "read"}
    assert len(read(path, **document).records["table"]) == 4


@pytest.mark.parametrize("kind", ["csv", "parquet", "hugging-face"])
def test_a_column_that_only_numbers_rows_is_no_feature_unless_named(kind, tmp_path):
    frame = pd.DataFrame({"x": [5.0, 6.0], "y": [0, 1]}, index=[7, 9])
    unnamed = "__index_level_0__"
    if kind == "csv":
        frame.to_csv(tmp_path / "first.csv")
        pd.read_csv(tmp_path / "first.csv").to_csv(tmp_path / "a.csv", index=False)
        path, unnamed = tmp_path / "a.csv", "Unnamed: 0"
        data = read(tmp_path / "first.csv", kind=kind, label="y", classes=2)
        assert data.records["table"].flatten().tolist() == [5, 6]
    elif kind == "parquet":
        path = tmp_path / "a.parquet"
        frame.to_parquet(path)
        frame.rename_axis("visit").to_parquet(tmp_path / "named.parquet")
        data = read(tmp_path / "named.parquet", kind=kind, label="y", classes=2, group_by="visit")
        assert data.records["table"].flatten().tolist() == [5, 6]
        assert data.records["group"].tolist() == [group_number("7"), group_number("9")]
    else:
        path = tmp_path / "a"
        write_hugging_face(path, pa.Table.from_pandas(frame))
    assert read(path, kind=kind, label="y", classes=2).records["table"].flatten().tolist() == [5, 6]
    data = read(path, kind=kind, label="y", classes=2, features=["x", unnamed])
    assert data.records["table"].tolist() == [[5, 7], [6, 9]]


@pytest.mark.parametrize("kind", ["csv", "parquet", "hugging-face", "npz"])
def test_missing_values_that_an_owner_states_hold_in_every_format(kind, tmp_path):
    document = {"kind": kind, "label": "y", "classes": 2, "missing": 7.0, "missing_values": ["-999"]}
    table = {"x": [-999.0, 2.5, -99.0], "n": [1, -999, 3], "y": [0, 1, 1], "g": [4, 5, -999]}
    grouped = document | {"group_by": "g"}
    path = tmp_path / "a"
    if kind == "csv":
        path.write_text(csv_text(table))
    elif kind == "npz":
        path = path.with_suffix(".npz")
        x = np.stack([table["x"], table["n"]], axis=1).astype(np.float32)
        np.savez(path, x=x, y=table["y"], g=np.array(table["g"], np.float32))
        document, grouped = document | {"table": "x"}, grouped | {"table": "x"}
    elif kind == "parquet":
        pq.write_table(pa.table(table | {"x": pa.array(table["x"], pa.float32())}), path)
    else:
        write_hugging_face(path, table | {"n": pa.array(table["n"], pa.decimal128(9, 2))})
    chosen = {} if kind == "npz" else {"features": ["x", "n"]}
    expected = [[7, 1], [2.5, 7], [-99, 3]]
    assert read(path, **document, **chosen).records["table"].tolist() == expected
    data = read(path, **grouped, **chosen)
    assert data.records["table"].tolist() == expected[:2]
    assert reasons(data) == {"row 3": "the group is missing, must be given"}


def test_a_category_that_stands_for_none_is_the_empty_one_unless_it_is_listed(tmp_path):
    path = write_csv(tmp_path, "k,y\nu,0\nNA,1\n?,1\n,0\n")
    data = read(path, kind="csv", label="y", classes=2, categories={"k": ["u", "?", ""]})
    assert data.records["table"].tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]]
    pq.write_table(pa.table({"k": [1.0, -999.0, None], "y": [0, 1, 1]}), tmp_path / "a.parquet")
    document = {"categories": {"k": ["1", ""]}, "missing_values": ["-999"]}
    data = read(tmp_path / "a.parquet", kind="parquet", label="y", classes=2, **document)
    assert data.records["table"].tolist() == [[1, 0], [0, 1], [0, 1]]
