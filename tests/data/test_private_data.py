"""Private data as a whole: groups, what the log says and what nobody else hears; real data where they are."""

from __future__ import annotations

import logging
import os
import re
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_text_config
from format_samples import PATIENTS, SAMPLES, TABLE, csv_text, parse, png, read

from conclave.base.errors import BadInputError
from conclave.data import private_data
from conclave.data.private_data import read_private
from conclave.data.values.kinds import group_number
from conclave.data.values.schema import ImageSchema, TextSchema
from conclave.model.building import build
from conclave.model.config import ModelConfig

DATA = os.environ.get("CONCLAVE_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="CONCLAVE_DATA is not set: the files are not here")
BAD = ["csv", "parquet", "hugging-face", "npz", "idx", "image-folder", "wav-folder", "text-folder"]


@pytest.mark.parametrize("name", SAMPLES)
def test_records_are_tensors_that_fit_their_schema(name, tmp_path):
    path, document = SAMPLES[name](tmp_path)
    data = read(path, **document)
    schema = type(data.schema).__name__
    modality = {"ImageSchema": "image", "TableSchema": "table", "TextSchema": "text"}[schema]
    values = data.records[modality]
    count = len(values)
    assert values.dtype == (torch.uint8 if modality == "text" else torch.float32)
    expected = {"image": lambda s: s.image, "table": lambda s: (s.features,), "text": lambda s: (s.window,)}
    assert tuple(values.shape[1:]) == expected[modality](data.schema)
    if modality == "image":
        assert 0.0 <= float(values.min()) < float(values.max()) <= 1.0
    if modality != "text":
        assert data.records["label"].dtype == torch.int64
        assert data.records["label"].shape == (count,)
        assert int(data.records["label"].max()) < data.schema.classes
    grouped = not name.startswith("idx")
    assert ("group" in data.records) == grouped
    if grouped:
        assert data.records["group"].dtype == torch.int64
        assert data.records["group"].shape == (count,)
        assert int(data.records["group"].min()) >= 0
    assert data.bad == ()


def model_for(schema, tokens="row") -> ModelConfig:
    """A small model that says it fits."""
    if isinstance(schema, TextSchema):
        config = make_text_config(encoder={"kind": "bytes", "window": schema.window})
    else:
        encoder = {"kind": "table", "features": getattr(schema, "features", 1), "tokens": tokens}
        if isinstance(schema, ImageSchema):
            _, height, width = schema.image
            encoder = {"kind": "image-patch", "height": height, "width": width, "patch": 1, "channels": schema.image[0]}
        head = {"kind": "classification", "classes": schema.classes}
        config = ModelConfig.model_validate(make_config().model_dump() | {"encoder": encoder, "head": head})
    assert schema.mismatch(config) is None
    return config


@pytest.mark.parametrize("name", SAMPLES)
def test_a_model_that_fits_the_schema_takes_the_records(name, tmp_path):
    path, document = SAMPLES[name](tmp_path)
    data = read(path, **document)
    network = build(model_for(data.schema), seed=1)
    batch = {key: tensor[:2] for key, tensor in data.records.items() if key != "group"}
    assert network.loss(batch).isfinite().all()


@pytest.mark.parametrize("name", SAMPLES)
def test_where_groups_are_the_unit_there_must_be_groups(name, tmp_path):
    path, document = SAMPLES[name](tmp_path)
    without = {key: value for key, value in document.items() if key not in ("group_by", "pattern")}
    if "text" in name:
        assert len(read(path, "group", **without).records["group"].unique()) == 2  # a file is a group by itself
        return
    with pytest.raises(BadInputError, match=r"unit is group, so format\.group_by must be given"):
        read(path, "group", **without)


def test_a_groups_number_is_its_own_for_good(tmp_path):
    """Whoever joins or leaves, in whatever order and format: the held-out split knows a group by its number."""
    path, document = SAMPLES["csv"](tmp_path)
    before = dict(zip(PATIENTS["patient"], read(path, **document).records["group"].tolist(), strict=True))
    lines = csv_text(PATIENTS).splitlines()
    path.write_text("\n".join([lines[0], "9,9,A,zoe,no", lines[3], "1,1,A,abe,no", lines[1]]))
    after = read(path, **document).records["group"].tolist()
    assert after == [group_number("zoe"), before["ann"], group_number("abe"), before["ann"]]
    assert len({*before.values(), *after}) == 5


def test_bad_rows_are_counted_and_named_in_the_nodes_log_only(tmp_path, caplog):
    secret = "Zaphod-4711"
    lines = [*csv_text(PATIENTS).splitlines(), f"{secret},1,A,zoe,no", f"1,1,{secret},zoe,no", f"1,1,A,zoe,{secret}"]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines))
    with caplog.at_level(logging.DEBUG):
        data = read(path, kind="csv", **TABLE)
    assert {record.name for record in caplog.records} == {"conclave.node"}
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"{path}: 3 of 7 rows cannot be used and are left out",
        f"{path}: row 5: column 'age' must be a finite number",
        f"{path}: row 6: column 'blood' must be one of its categories",
        f"{path}: row 7: the label must be one of labels, or a number below classes",
    ]
    assert [f"{path}: {row.where}: {row.why}" for row in data.bad] == messages[1:]
    assert secret not in caplog.text


def test_good_data_log_nothing(tmp_path, caplog):
    for number, make in enumerate(SAMPLES.values()):
        (tmp_path / str(number)).mkdir()
        path, document = make(tmp_path / str(number))
        with caplog.at_level(logging.DEBUG, logger="conclave.node"):
            read(path, **document)
    assert [record for record in caplog.records if record.name == "conclave.node"] == []


def test_of_very_many_bad_rows_the_first_are_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(private_data, "MOST_NAMED", 3)
    (tmp_path / "a.csv").write_text("a,y\n1,0\n" + "x,0\n" * 10)
    data = read(tmp_path / "a.csv", kind="csv", label="y", classes=2)
    assert len(data.bad) == 10
    messages = [record.getMessage() for record in caplog.records]
    assert "10 of 11 rows" in messages[0]
    assert [message.split(": ")[1] for message in messages[1:4]] == ["row 2", "row 3", "row 4"]
    assert messages[4].endswith("7 more are not named")
    assert len(messages) == 5


def test_a_file_cannot_write_lines_of_its_own_into_the_log(tmp_path, caplog):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "good.png").write_bytes(png(torch.zeros(4, 4, dtype=torch.uint8).numpy()))
    (tmp_path / "0" / "a\n2026-01-01 all is well\x1b[2J.png").write_bytes(b"")
    read(tmp_path, kind="image-folder", height=4, width=4, classes=2)
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert "a\N{REPLACEMENT CHARACTER}2026-01-01 all is well" in caplog.text


@pytest.mark.parametrize("name", BAD)
def test_where_no_row_can_be_used_the_sentence_names_none(name, tmp_path, caplog):
    path, document = SAMPLES[name](tmp_path)
    if "text" in name:
        document = document | {"window": 1000}
    else:
        document = {key: value for key, value in document.items() if key != "classes"} | {"labels": ["u", "v"]}
    with pytest.raises(BadInputError) as caught:
        read(path, **document)
    assert str(caught.value) == f"{path}: none of its rows can be used, must have one; the node's log says why"
    assert len(caplog.records) > 1


@pytest.mark.parametrize("name", SAMPLES)
def test_a_path_that_is_not_there_is_one_sentence(name, tmp_path):
    _, document = SAMPLES[name](tmp_path)
    with pytest.raises(BadInputError, match=f"^{re.escape(str(tmp_path / 'missing'))}: .*must be"):
        read_private(tmp_path / "missing", parse(document), "record")


@pytest.mark.parametrize("name", ["image-folder", "wav-folder", "text-folder"])
def test_a_file_that_cannot_be_read_costs_its_own_row_only(name, tmp_path, monkeypatch):
    path, document = SAMPLES[name](tmp_path)
    whole = read(path, **document)
    denied = min(file for file in path.rglob("*") if file.is_file())
    opened = Path.open

    def some(file, *arguments, **options):
        if file == denied:
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *arguments, **options)

    monkeypatch.setattr(Path, "open", some)
    data = read(path, **document)
    assert [(row.where, row.why) for row in data.bad] == [
        (str(denied.relative_to(path)), "must be a file that can be read")
    ]
    assert 0 < len(data.records["group"]) < len(whole.records["group"])


HEART = [
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"),
    *("thalach", "exang", "oldpeak", "slope", "ca", "thal", "num"),
]
"""The columns of the UCI heart-disease files, as heart-disease.names lists them."""


@needs_data
@pytest.mark.parametrize(
    ("hospital", "patients", "complete", "ill"),
    [("cleveland", 303, 297, 139), ("hungarian", 294, 1, 106), ("switzerland", 123, 0, 115), ("va", 200, 1, 149)],
)
def test_every_patient_of_the_heart_disease_files(hospital, patients, complete, ill):
    """Counts as published: 303 patients in Cleveland of whom 6 lack a value; ill where num is above 0."""
    path = Path(DATA, "heart-disease", f"processed.{hospital}.data")
    document = {"kind": "csv", "columns": HEART, "label": "num", "labels": {"0": 0, "1": 1, "2": 1, "3": 1, "4": 1}}
    data = read(path, **document, missing=0.0, center={"age": 54, "chol": 240}, scale={"age": 9, "chol": 50})
    assert data.records["table"].shape == (patients, 13)
    assert data.bad == ()
    assert int(data.records["label"].sum()) == ill
    rows = [line.split(",") for line in path.read_text().splitlines()]
    ages = [0.0 if row[0] == "?" else (float(row[0]) - 54) / 9 for row in rows]
    torch.testing.assert_close(data.records["table"][:, 0], torch.tensor(ages))
    assert sum("?" not in row for row in rows) == complete
    if complete:
        strict = read(path, **document)
        assert (len(strict.records["table"]), len(strict.bad)) == (complete, patients - complete)
    else:
        with pytest.raises(BadInputError, match="none of its rows can be used"):
            read(path, **document)


@needs_data
def test_every_recording_of_the_spoken_digits(tmp_path):
    with tarfile.open(Path(DATA, "fsdd", "recordings.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    pattern = r"(?P<label>\d)_(?P<group>[a-z]+)_\d+"
    data = read(tmp_path, "group", kind="wav-folder", rate=8000, seconds=1, classes=10, pattern=pattern)
    assert data.records["image"].shape == (3000, 1, 32, 61)
    assert data.bad == ()
    assert data.records["label"].bincount().tolist() == [300] * 10
    speakers, counts = data.records["group"].unique(return_counts=True)
    names = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
    assert sorted(speakers.tolist()) == sorted(map(group_number, names))
    assert counts.tolist() == [500] * 6
    assert 0.05 < float(data.records["image"].mean()) < 0.5


@needs_data
def test_every_digit_of_mnist():
    data = read(Path(DATA, "mnist"), kind="idx", classes=10)
    assert data.records["image"].shape == (60_000, 1, 28, 28)
    assert float(data.records["image"].mean()) == pytest.approx(0.1307, abs=1e-4)
    assert data.records["label"].bincount().tolist()[:3] == [5923, 6742, 5958]
    test = {"image_file": "t10k-images-idx3-ubyte", "label_file": "t10k-labels-idx1-ubyte"}
    assert len(read(Path(DATA, "mnist"), kind="idx", classes=10, **test).records["label"]) == 10_000
