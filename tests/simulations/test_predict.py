"""Prediction from files and from the public test split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from family_samples import make_table_config
from PIL import Image

from data.config import DataConfig
from data.shipped_scenarios import find
from data.sources import load as load_data
from model import build, parameters, save_model
from model.errors import BadInputError
from server.scenario import read_scenario
from simulations.predict import predict

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
    for wrong in ("1,2", "", "a,b,c,d,e,f,g", "1,2,3,4,5,6,nan", "1,2,3,4,5,6,7,8"):
        with pytest.raises(BadInputError, match="must be 7 finite numbers"):
            predict(tmp_path, wrong)
