"""Prediction from files and from the public test split."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from family_samples import make_table_config
from PIL import Image
from pydantic import TypeAdapter

from conclave.base.errors import BadInputError
from conclave.data.config import DataConfig
from conclave.data.formats.config import FormatConfig
from conclave.data.private_data import read_private
from conclave.data.sources import load as load_data
from conclave.model import parameters
from conclave.model.building import build
from conclave.model.config import ModelConfig
from conclave.model.store import save_model
from conclave.report.predict import predict
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find

TEST = load_data(DataConfig(source="digits")).test


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = read_scenario(find("digits")).model
    network = build(config, seed=5)
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "model", config, parameters.split(network.state_dict(), network.held))
    return folder, network.eval()


def test_it_is_the_models_own_answer(model):
    folder, network = model
    for number in (0, 7, 359):
        prediction = predict(folder, f"digits:{number}")
        scores = network({"image": TEST["image"][number : number + 1]}).scores[0]
        assert prediction.label == int(scores.argmax())
        assert prediction.truth == int(TEST["label"][number])
        torch.testing.assert_close(torch.tensor(prediction.probabilities), scores.softmax(0))
        assert prediction.probability == max(prediction.probabilities)


def test_array_and_image_files_give_the_same_answer(model, tmp_path):
    folder, _ = model
    image = TEST["image"][3, 0].numpy()
    np.save(tmp_path / "x.npy", image)
    Image.fromarray(np.round(image * 255).astype(np.uint8), mode="L").save(tmp_path / "x.png")
    expected = predict(folder / "model", "digits:3").probabilities
    assert predict(folder, str(tmp_path / "x.npy")).probabilities == expected
    np.testing.assert_allclose(predict(folder, str(tmp_path / "x.png")).probabilities, expected, atol=0.02)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """A model of small coloured pictures."""
    encoder = {"kind": "image-patch", "height": 8, "width": 8, "channels": 3, "patch": 8}
    config = make_table_config("row")
    config = ModelConfig.model_validate(config.model_dump() | {"encoder": encoder})
    network = build(config, seed=5)
    folder = tmp_path_factory.mktemp("coloured")
    save_model(folder, config, parameters.split(network.state_dict(), network.held))
    return folder, network.eval()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sort", ["16 bits", "other size", "turned", "transparent", "palette", "CMYK"])
def test_a_picture_is_what_it_was_in_training(model, coloured, tmp_path, channels, sort):
    """A folder of private pictures, read for training, and the same file given for prediction."""
    draw = np.random.default_rng(0)
    deep = draw.integers(0, 65536, (8, 8)).astype(np.uint16)
    colours = draw.integers(0, 256, (29, 13, 3)).astype(np.uint8)
    path = tmp_path / "0" / ("x.jpg" if sort in ("turned", "CMYK") else "x.png")
    path.parent.mkdir()
    image = Image.fromarray(deep if sort == "16 bits" else colours)
    if sort == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    else:
        modes = {"transparent": "RGBA", "palette": "P", "CMYK": "CMYK"}
        (image.convert(modes[sort]) if sort in modes else image).save(path)
    document = {"kind": "image-folder", "height": 8, "width": 8, "channels": channels, "classes": 10}
    trained = read_private(tmp_path, TypeAdapter(FormatConfig).validate_python(document), "record").records["image"]
    folder, network = model if channels == 1 else coloured
    expected = network({"image": trained}).scores[0].softmax(0)
    torch.testing.assert_close(torch.tensor(predict(folder, str(path)).probabilities), expected)


def test_an_array_is_what_it_was_in_training(model, tmp_path):
    folder, network = model
    grey = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
    arrays = {"u": grey, "f": grey / 255, "half": (grey > 99).astype(np.float16), "c": grey[np.newaxis]}
    for name, array in arrays.items():
        np.savez(tmp_path / "all.npz", image=np.atleast_3d(array)[None] if array.ndim == 2 else array, label=[0])
        format_ = {"kind": "npz", "image": "image", "label": "label", "classes": 10}
        format_ |= {"axes": "HWC"} if array.ndim == 2 else {}
        config = TypeAdapter(FormatConfig).validate_python(format_)
        trained = read_private(tmp_path / "all.npz", config, "record").records["image"]
        np.save(tmp_path / f"{name}.NPY.npy", array)
        (tmp_path / f"{name}.NPY.npy").rename(tmp_path / f"{name}.NPY")
        expected = network({"image": trained}).scores[0].softmax(0)
        torch.testing.assert_close(torch.tensor(predict(folder, str(tmp_path / f"{name}.NPY")).probabilities), expected)


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def test_what_training_would_leave_out_is_refused(model, tmp_path):
    folder, _ = model
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40)).astype(np.uint8)).save(whole, "PNG")
    png = whole.getvalue()
    files = {
        "negative.npy": np.full((8, 8), -0.1), "large.npy": np.full((8, 8), 1.1), "inf.npy": np.full((8, 8), np.inf),
        "ints.npy": np.full((8, 8), 200), "flags.npy": np.zeros((8, 8), bool), "complex.npy": np.zeros((8, 8), complex),
        "flat.npy": np.zeros(64), "four.npy": np.zeros((1, 1, 8, 8)), "colours.npy": np.zeros((3, 8, 8)),
        "records.npy": np.zeros((8, 8), [("a", "f4")]), "words.npy": np.full((8, 8), "x"),
        "cut.npy": b"", "cut.png": png[:200], "chunk.png": png.replace(b"IDAT", b"T$k+"), "empty.png": b"",
        "huge.npy": npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999, 9), }\n"),
        "deep.npy": npy(b"(" * 255), "sound.wav": b"RIFF\0\0\0\0WAVE", "tiff.tif": b"II*\0",
    }  # fmt: skip
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            np.save(tmp_path / name, content)
    np.savez(tmp_path / "archive.npz", np.zeros((8, 8)))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    (tmp_path / "folder.png").mkdir()
    for path in [*sorted(tmp_path.iterdir()), f"digits:{'9' * 5000}", "digits:-1", "digits:²", "digits:"]:
        with pytest.raises(BadInputError, match=r"must (be|have)") as caught:
            predict(folder, str(path))
        assert len(str(caught.value).splitlines()) == 1


def test_bad_input_is_refused_in_one_sentence(model, tmp_path):
    folder, _ = model
    np.save(tmp_path / "wrong.npy", np.zeros((3, 3)))
    np.save(tmp_path / "nan.npy", np.full((8, 8), np.nan))
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "text.png").write_text("no image")
    for source in ("digits:360", "digits:x", str(tmp_path / "none.png"), *map(str, tmp_path.iterdir())):
        with pytest.raises(BadInputError, match="must be"):
            predict(folder, source)
    with pytest.raises(BadInputError, match="saved model"):
        predict(tmp_path, "digits:0")


@pytest.mark.parametrize("tokens", ["row", "feature"])
def test_a_row_of_a_table_is_numbers_with_commas(tmp_path, tokens):
    config = make_table_config(tokens)
    network = build(config, seed=5).eval()
    save_model(tmp_path, config, parameters.split(network.state_dict(), network.held))
    row = [0.5, -1, 2e-1, 0, 3, 4.25, -0.125]
    expected = network({"table": torch.tensor([row])}).scores[0].softmax(0)
    found = predict(tmp_path, ",".join(map(str, row)))
    torch.testing.assert_close(torch.tensor(found.probabilities), expected)
    assert found.truth is None
    spaced = ", ".join(map(str, row))
    assert predict(tmp_path, spaced).probabilities == found.probabilities
    numbers = "1,2,3,4,5,6,"
    for wrong in ("1,2", "", "a,b,c,d,e,f,g", *(numbers + last for last in ("nan", "7,8", "1_0", "1e39", "inf", ""))):
        with pytest.raises(BadInputError, match="must be 7 finite numbers"):
            predict(tmp_path, wrong)
