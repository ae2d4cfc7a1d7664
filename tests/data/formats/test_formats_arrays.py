"""Arrays that numpy saved, and pairs of IDX files."""

from __future__ import annotations

import gzip
import io
import zipfile

import numpy as np
import pytest
import torch
from format_samples import SAMPLES, read
from idx_samples import idx_bytes

from conclave.base.errors import BadInputError
from conclave.data.formats import npz_file
from conclave.data.values.kinds import group_number
from conclave.data.values.schema import ImageSchema, TableSchema, TextSchema

DRAW = np.random.default_rng(0)
GREY = DRAW.integers(0, 256, (3, 4, 5)).astype(np.uint8)
COLOUR = DRAW.integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
LABELS = [1, 0, 1]
IMAGE = {"kind": "npz", "image": "x", "label": "y", "classes": 2}
TABLE = {"kind": "npz", "table": "x", "label": "y", "classes": 2}


def save(folder, packed=False, **arrays):
    (np.savez_compressed if packed else np.savez)(folder / "a.npz", **arrays)
    return folder / "a.npz"


def reasons(data):
    return {row.where: row.why for row in data.bad}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("x", "axes", "image"),
    [
        (GREY, "HW", (1, 4, 5)),
        (GREY[:, None], "CHW", (1, 4, 5)),
        (COLOUR, "HWC", (3, 4, 5)),
        (COLOUR.transpose(0, 3, 1, 2), "CHW", (3, 4, 5)),
    ],
)
def test_pictures_of_any_order_of_axes(x, axes, image, packed, tmp_path):
    data = read(save(tmp_path, packed, x=x, y=LABELS), **IMAGE, axes=axes)
    assert data.schema == ImageSchema(image=image, classes=2)
    expected = GREY[:, None] if image[0] == 1 else COLOUR.transpose(0, 3, 1, 2)
    assert data.records["image"].dtype == torch.float32
    np.testing.assert_array_equal(data.records["image"].numpy(), expected.astype(np.float32) / 255)
    assert data.records["label"].tolist() == LABELS
    assert set(data.records) == {"image", "label"}


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_pictures_of_floats_must_be_between_0_and_1(kind, tmp_path):
    x = np.full((5, 2, 2), 0.5, dtype=kind)
    x[0, 0, 0], x[0, 1, 1], x[1, 0, 0], x[2, 0, 0], x[3, 1, 0] = 0.0, 1.0, -0.01, 1.01, np.nan
    data = read(save(tmp_path, x=x, y=[0, 1, 1, 1, 1]), **IMAGE)
    assert data.records["image"].tolist() == [[[[0.0, 0.5], [0.5, 1.0]]], [[[0.5, 0.5], [0.5, 0.5]]]]
    assert data.records["label"].tolist() == [0, 1]
    assert reasons(data) == {f"row {n}": "a picture's values must be in [0, 1]" for n in (2, 3, 4)}


def test_tables_are_standardised_by_public_constants(tmp_path):
    x = [[1.0, 10.0], [3.0, np.nan], [np.inf, 0.0], [5.0, 30.0], [1e300, 0.0]]
    path = save(tmp_path, x=x, y=[0, 1, 1, 1, 1])
    data = read(path, **TABLE, center=[1, 10], scale=[2, 10])
    assert data.schema == TableSchema(features=2, classes=2)
    assert data.records["table"].tolist() == [[0, 0], [2, 2]]
    assert reasons(data) == {
        "row 2": "a value is missing, must be given where missing is not set",
        "row 3": "a value must be a finite number, within what float32 holds",
        "row 5": "a value must be a finite number, within what float32 holds",
    }
    data = read(path, **TABLE, center=1.0, missing=-1)
    assert data.records["table"].tolist() == [[0, 9], [2, -1], [4, 29]]
    whole = save(tmp_path, x=np.array([[1, 2], [3, 4]], dtype=np.int16), y=[True, False])
    data = read(whole, kind="npz", table="x", label="y", labels=["false", "true"])
    assert data.records["table"].tolist() == [[1, 2], [3, 4]]
    assert data.records["label"].tolist() == [1, 0]
    half = save(tmp_path, x=np.array([[1, np.inf], [3, 4]], dtype=np.float16), y=[0, 1])
    data = read(half, **TABLE, missing=0, missing_values=["inf", "1e300"])  # half precision has no 1e300
    assert data.records["table"].tolist() == [[1, 0], [3, 4]]


def test_text_is_windows_of_bytes(tmp_path):
    x = np.arange(12, dtype=np.uint8).reshape(3, 4)
    data = read(save(tmp_path, x=x, who=["a", "b", "a"]), "group", kind="npz", text="x", group_by="who")
    assert data.schema == TextSchema(window=4)
    np.testing.assert_array_equal(data.records["text"].numpy(), x)
    assert data.records["group"].tolist() == [group_number(name) for name in "aba"]
    assert set(data.records) == {"text", "group"}


def test_labels_and_groups_may_be_numbers_or_strings(tmp_path):
    x = np.zeros((4, 2))
    path = save(tmp_path, x=x, y=np.array(["no", "yes", "perhaps", "no"]), g=np.array([1.0, 2.0, 3.0, np.nan]))
    data = read(path, "group", kind="npz", table="x", label="y", labels=["no", "yes"], group_by="g")
    assert data.records["label"].tolist() == [0, 1]
    assert data.records["group"].tolist() == [group_number("1"), group_number("2")]
    assert reasons(data) == {
        "row 3": "the label must be one of labels, or a number below classes",
        "row 4": "the group is missing, must be given",
    }
    path = save(tmp_path, x=x, y=np.array([b"no", b"yes", b"\xff", b"no"]))
    data = read(path, kind="npz", table="x", label="y", labels={"no": 0, "yes": 1})
    assert data.records["label"].tolist() == [0, 1, 0]


class Harmful:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize("name", ["x", "y"])
def test_python_objects_are_refused_and_never_unpickled(name, tmp_path, capsys):
    arrays = {"x": np.zeros((2, 2)), "y": np.array([0, 1])}
    arrays[name] = np.array([Harmful(), Harmful()], dtype=object)
    with pytest.raises(BadInputError, match=r"must be an undamaged \.npz file without Python objects"):
        read(save(tmp_path, **arrays), **TABLE)
    np.save(tmp_path / "b.npy", arrays[name], allow_pickle=True)
    with pytest.raises(BadInputError, match="without Python objects"):
        read(tmp_path / "b.npy", **TABLE)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arrays", "document", "expected"),
    [
        ({"x": GREY}, IMAGE, "has no array 'y', must have it"),
        ({"y": [1]}, IMAGE, "has no array 'x', must have it"),
        ({"x": GREY, "y": [1, 0]}, IMAGE, r"'y' has the shape \[2\], must be \[3\]"),
        ({"x": GREY, "y": [[1], [0], [1]]}, IMAGE, r"'y' has the shape \[3, 1\], must be \[3\]"),
        ({"x": COLOUR, "y": LABELS}, IMAGE, r"'x' is uint8 \[4, 5, 3\] a record, must be uint8 or float HW"),
        ({"x": GREY.astype(int), "y": LABELS}, IMAGE, "must be uint8 or float HW"),
        ({"x": GREY[:, :0], "y": LABELS}, IMAGE, "must be uint8 or float HW"),
        ({"x": GREY, "y": LABELS}, TABLE, r"must be numbers \[features\]"),
        ({"x": np.array([["a"], ["b"]]), "y": [0, 1]}, TABLE, r"must be numbers \[features\]"),
        ({"x": np.zeros((2, 3)), "y": [0, 1]}, TABLE | {"scale": [1, 2]}, "scale has 2 constants, must have one or 3"),
        ({"x": np.zeros((2, 3))}, {"kind": "npz", "text": "x"}, r"must be uint8 \[window\]"),
        ({"x": np.zeros((2, 3)), "y": np.zeros(2, complex)}, TABLE, "must be an array of numbers or strings"),
        ({"x": np.float64(1.0), "y": [0, 1]}, TABLE, "must be an array of numbers or strings"),
        ({"x": np.zeros((0, 3)), "y": []}, TABLE, "has no rows, must have one that can be used"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_one_sentence(arrays, document, expected, tmp_path):
    with pytest.raises(BadInputError, match=expected):
        read(save(tmp_path, **arrays), **document)


def test_a_file_that_unpacks_to_too_much_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_file, "MOST_BYTES", 1000)
    with pytest.raises(BadInputError, match="unpacks to more than 1000 bytes"):
        read(save(tmp_path, packed=True, x=np.zeros((100, 2)), y=np.zeros(100, int)), **TABLE)


def test_an_array_that_claims_more_than_there_is_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 2)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(16))
        archive.writestr("y.npy", header.getvalue() + bytes(16))
    with pytest.raises(BadInputError, match="must be an undamaged"):
        read(tmp_path / "a.npz", **TABLE)


def test_damaged_archives_never_end_in_a_traceback(tmp_path):
    path, document = SAMPLES["npz"](tmp_path)
    whole, outcomes = path.read_bytes(), set()
    for trial in range(200):
        content = bytearray(whole)
        if trial % 4 == 0:
            del content[DRAW.integers(len(content)) :]
        for place in DRAW.integers(len(content), size=trial % 4) if content else ():
            content[place] = DRAW.integers(256)
        path.write_bytes(content)
        try:
            data = read(path, **document)
        except BadInputError as error:
            outcomes.add("refused" if str(path) in str(error) else str(error))
        else:
            outcomes.add("read")
            assert data.records["image"].isfinite().all()
    assert outcomes == {"refused", "read"}


@pytest.mark.parametrize("name", ["idx", "idx, gz"])
def test_idx_files_are_pictures_and_labels(name, tmp_path):
    path, document = SAMPLES[name](tmp_path)
    data = read(path, **document)
    expected = np.random.default_rng(0).integers(0, 256, (4, 6, 5)) / 255
    assert data.schema == ImageSchema(image=(1, 6, 5), classes=2)
    np.testing.assert_allclose(data.records["image"][:, 0].numpy(), expected, atol=1e-7)
    assert data.records["image"].dtype == torch.float32
    assert data.records["label"].tolist() == [0, 1, 1, 0]


def test_idx_labels_may_be_mapped_and_unknown_ones_are_bad_rows(tmp_path):
    path, document = SAMPLES["idx"](tmp_path)
    (path / "labels").write_bytes(idx_bytes(np.array([0, 7, 9, 3])))
    del document["classes"]
    data = read(path, **document, labels={"0": 0, "7": 1, "3": 1})
    assert data.records["label"].tolist() == [0, 1, 1]
    assert reasons(data) == {"row 3": "the label must be one of labels, or a number below classes"}


def test_idx_folders_that_do_not_fit_are_one_sentence(tmp_path):
    path, document = SAMPLES["idx, gz"](tmp_path)
    with pytest.raises(BadInputError, match="has no train-images-idx3-ubyte, must have it"):
        read(path, kind="idx", classes=10)
    with pytest.raises(BadInputError, match="must be a folder"):
        read(path / "labels.gz", **document)
    with pytest.raises(BadInputError, match=r"must be \[one or more, 6, 4\]"):
        read(path, **document | {"width": 4})
    (path / "labels.gz").write_bytes(gzip.compress(idx_bytes(np.array([0, 1]))))
    with pytest.raises(BadInputError, match="has 2 labels, must have one for each of the 4 images"):
        read(path, **document)
    (path / "labels.gz").write_bytes(b"damaged")
    with pytest.raises(BadInputError, match="must be an undamaged IDX file"):
        read(path, **document)
