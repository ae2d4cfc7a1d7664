"""Which configurations of formats are refused, and with what words."""

from __future__ import annotations

import json

import pytest
from format_samples import SAMPLES, parse
from pydantic import ValidationError

from conclave.base.explain import explain
from conclave.base.frozen import Frozen
from conclave.data.formats.config import FormatConfig

CSV = {"kind": "csv", "label": "y", "classes": 2}
NPZ = {"kind": "npz", "table": "x", "label": "y", "classes": 2}
PICTURES = {"kind": "image-folder", "height": 4, "width": 4, "classes": 2}
SOUND = {"kind": "wav-folder", "rate": 8000, "seconds": 1.0, "classes": 2}
TEXT = {"kind": "text-folder", "window": 4}
COLUMN = {"column": "x", "height": 4, "width": 4}


def changed(document, change):
    return {key: value for key, value in (document | change).items() if value is not None}


@pytest.mark.parametrize(
    ("document", "change", "expected"),
    [
        (CSV, {"kind": "excel"}, "'csv', 'parquet', 'hugging-face', 'npz', 'idx', 'image-folder', 'wav-folder'"),
        (CSV, {"colour": "red"}, "colour"),
        (CSV, {"classes": None}, "exactly one of labels and classes must be given"),
        (CSV, {"labels": ["no", "yes"]}, "exactly one of labels and classes must be given"),
        (CSV, {"classes": 1}, "greater than or equal to 2"),
        (CSV, {"classes": None, "labels": ["no"]}, "labels name 1 class, must name at least 2"),
        (CSV, {"classes": None, "labels": {"no": 0, "never": 0}}, "labels name 1 class, must name at least 2"),
        (CSV, {"classes": None, "labels": {"no": -1, "yes": 1}}, "greater than or equal to 0"),
        (CSV, {"classes": None, "labels": ["no", "no"]}, "names one value twice"),
        (CSV, {"classes": None, "labels": ["1", "1.0"]}, "names one value twice"),
        (CSV, {"classes": None, "labels": ["no", " no"]}, "names one value twice"),
        (CSV, {"classes": None, "labels": {"1": 0, "1.0": 1}}, "names one value twice"),
        (CSV, {"classes": None, "labels": ["no", " "]}, "names a blank value"),
        (CSV, {"categories": {"b": ["1.5", "1.50"]}}, "names one value twice"),
        (CSV, {"label": " "}, "is blank, must name a column"),
        (CSV, {"features": ["a", " a"]}, "names one value twice"),
        (CSV, {"group_by": " y"}, "label and group_by are both 'y', must be two columns"),
        (CSV, {"label": None}, "label is missing, must name the column of the label"),
        (CSV, {"group_by": "y"}, "label and group_by are both 'y', must be two columns"),
        (CSV, {"features": ["y", "z"]}, "the column 'y' is label or group, must not be a feature"),
        (CSV, {"categories": {"g": ["a"]}, "group_by": "g"}, "the column 'g' is label or group"),
        (CSV, {"features": ["a"], "center": {"b": 1.0}}, "center names the column 'b', must be one of features"),
        (CSV, {"features": ["a"], "categories": {"b": ["u"]}}, "categories names the column 'b', must be one of"),
        (CSV, {"scale": {"b": 1.0}, "categories": {"b": ["u"]}}, "scale names the column 'b', must not be one of cat"),
        (CSV, {"categories": {"b": []}}, "at least 1 item"),
        (CSV, {"categories": {"b": ["u", "u"]}}, "names one value twice"),
        (CSV, {"features": ["a", "a"]}, "names one value twice"),
        (CSV, {"features": []}, "at least 1 item"),
        (CSV, {"scale": 0.0}, "greater than 0"),
        (CSV, {"scale": {"a": -1.0}}, "greater than 0"),
        (CSV, {"center": "mean"}, "must be a number that you state: constants are public, and never worked out"),
        (NPZ, {"scale": "std"}, "must be a number that you state"),
        (CSV, {"delimiter": ";;"}, "delimiter"),
        (CSV, {"delimiter": "§"}, "delimiter"),
        (CSV, {"delimiter": "5"}, "delimiter"),
        (CSV, {"columns": ["a", "a"]}, "names one value twice"),
        (CSV, {"text": {"column": "x", "window": 4}}, "label is given beside text, must not be: text has no labels"),
        (CSV, {"label": None, "text": {"column": "x", "window": 4}}, "classes is given beside text"),
        (CSV, {"image": COLUMN}, "image"),
        (CSV, {"kind": "parquet", "image": COLUMN, "scale": 2.0}, "scale is given beside image, must not be"),
        (CSV, {"kind": "parquet", "image": COLUMN, "text": {"column": "x", "window": 4}}, "text and image are both"),
        (CSV, {"kind": "hugging-face", "image": COLUMN | {"channels": 2}}, "channels"),
        (NPZ, {"text": "t"}, "exactly one of image, table and text must be given"),
        (NPZ, {"table": None}, "exactly one of image, table and text must be given"),
        (NPZ, {"table": None, "image": "x", "center": 1.0}, "center is given, must not be without table"),
        (NPZ, {"axes": "HWC"}, "axes is given, must not be without image"),
        (NPZ, {"table": None, "text": "t"}, "label is given beside text"),
        (NPZ, {"label": None}, "label is missing, must name the array of labels"),
        (NPZ, {"scale": [1.0, 0.0]}, "greater than 0"),
        (PICTURES, {"channels": 2}, "channels"),
        (PICTURES, {"height": 0}, "height"),
        (PICTURES, {"max_pixels": 1 << 30}, "max_pixels"),
        (PICTURES, {"pattern": "("}, "is no regular expression"),
        (PICTURES, {"pattern": r"\d+"}, r"must name a group \(\?P<label>…\) or"),
        (PICTURES, {"pattern": r"(?P<labels>\d+)"}, "and no other"),
        (PICTURES, {"pattern": r"(?P<group>\d+)", "group_by": "file"}, "group_by is file and pattern names a group"),
        (PICTURES, {"group_by": "patient"}, "group_by"),
        (SOUND, {"rate": 999}, "rate"),
        (SOUND, {"seconds": 0.01}, "fft is 256, must be at most the 80 samples of 0.01 seconds"),
        (SOUND, {"mels": 200}, "mels is 200, must be fewer: a band would lie between two frequencies"),
        (SOUND, {"seconds": 100.0, "hop": 1}, "hop is 1, must give at most 65536 frames"),
        (TEXT, {"window": 1}, "window"),
        (TEXT, {"pattern": r"(?P<label>\d+)"}, "pattern names a label, must not: text has no labels"),
        (TEXT, {"pattern": r"(?P<group>\d+)", "group_by": "folder"}, "group_by is folder and pattern names a group"),
    ],
)
def test_a_wrong_configuration_is_refused(document, change, expected):
    parse(document)
    with pytest.raises(ValidationError, match=expected):
        parse(changed(document, change))


@pytest.mark.parametrize("name", SAMPLES)
def test_configurations_are_kept_whole_as_json_and_cannot_be_changed(name, tmp_path):
    _, document = SAMPLES[name](tmp_path)
    config = parse(document)
    assert type(config).model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.kind = "csv"


def test_one_class_may_have_several_spellings_of_a_label():
    config = parse(changed(CSV, {"classes": None, "labels": {"1": 1, "1.0": 1, " 0": 0}}))
    assert config.labelled.known() == {"1": 1, "0": 0}


def test_whole_numbers_may_stand_for_constants():
    config = parse(CSV | {"center": 1, "scale": {"a": 2}, "missing": 0})
    assert (config.center, config.scale, config.missing) == (1.0, {"a": 2.0}, 0.0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": 3, "classes": None}, "format.labels is 3, must be a valid array"),
        ({"labels": {"no": "x"}, "classes": None}, "format.labels.no is 'x', must be a valid integer"),
        ({"labels": ["no", 1], "classes": None}, "format.labels.1 is 1, must be a valid string"),
        ({"scale": 0}, "format.scale is 0, must be greater than 0"),
        ({"scale": {"a": 0}}, "format.scale.a is 0, must be greater than 0"),
        ({"classes": 1}, "format.classes is 1, must be greater than or equal to 2"),
        ({"categories": {"a": "x"}}, "format.categories.a is 'x', must be a valid array"),
        ({"colour": 1}, "unknown key format.colour, the nearest known key is format.columns"),
        ({"classes": None}, "format: exactly one of labels and classes must be given"),
        ({"text": {"column": "x"}}, "format.text.window is missing"),
    ],
)
def test_errors_name_the_key_as_its_owner_wrote_it(change, expected):
    class Document(Frozen):
        format: FormatConfig

    with pytest.raises(ValidationError) as caught:
        Document.model_validate_json(json.dumps({"format": changed(CSV, change)}))
    assert explain(caught.value, Document) == expected
