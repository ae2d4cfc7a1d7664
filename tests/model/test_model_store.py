"""Models on disk: bit-exact, and one sentence for whatever is wrong with a folder."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import make_batch, make_config

from conclave.base.errors import BadInputError
from conclave.base.whole_file import append_durably, write_atomically
from conclave.model import parameters
from conclave.model.building import build
from conclave.model.store import load, save_model


@pytest.fixture
def saved(tmp_path, config):
    network = build(config, 1)
    with torch.no_grad():
        network.head.score.weight[0, :4] = torch.tensor([-0.0, 1e-45, 3.4e38, 1 / 3])
    folder = tmp_path / "deep" / "model"
    save_model(folder, config, parameters.split(network.state_dict(), network.held))
    return folder, network


def refusal(folder) -> str:
    with pytest.raises(BadInputError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def bits(tensor):
    return tensor.view(torch.int32)


def test_save_and_load_are_bit_exact(saved, config):
    folder, network = saved
    loaded = load(folder)
    assert loaded.config == config
    assert not loaded.training
    state = network.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(bits(t), bits(state[name])) for name, t in loaded.state_dict().items())
    assert torch.equal(loaded(make_batch(4)).scores, network(make_batch(4)).scores)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved[0] / name).unlink()
    assert f"no {name} here" in refusal(saved[0])


def test_a_missing_folder_is_bad_input(tmp_path):
    refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_weights_are_bad_input(saved, keep):
    path = saved[0] / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert "damaged" in refusal(saved[0])


@pytest.mark.parametrize("experts", [{"routed": 7}, {"hidden": 16}, {"shared": 0}, {"shared": 2}])
def test_weights_of_another_model_are_bad_input(saved, experts):
    (saved[0] / "model.json").write_text(make_config(**experts).model_dump_json())
    assert "model.safetensors" in refusal(saved[0])


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", "\x00"])
def test_damaged_configuration_is_bad_input(saved, text):
    (saved[0] / "model.json").write_text(text)
    assert "model.json" in refusal(saved[0])


def test_an_unknown_key_in_the_configuration_is_bad_input(saved):
    path = saved[0] / "model.json"
    document = json.loads(path.read_text())
    for table in (document, document["experts"]):
        table["novelty"] = 1
        path.write_text(json.dumps(document))
        assert "model.json" in refusal(saved[0])
        del table["novelty"]
    path.write_text(json.dumps(document))
    load(saved[0])


def test_write_atomically_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file"
    for content in (b"old", b"", b"new" * 100_000):
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert caught.value.filename == str(path)
    if call == "fsync":
        with pytest.raises(OSError, match="No space left") as caught:
            append_durably(path, b"more")
        assert caught.value.filename == str(path)


def test_weights_that_do_not_belong_to_the_configuration_are_refused(tmp_path):
    network = build(make_config(), seed=1)
    wire = parameters.split(network.state_dict(), network.held)
    spoiled = {
        "fewer": (make_config(routed=5), wire),
        "double": (make_config(), {name: tensor.double() for name, tensor in wire.items()}),
        "nan": (make_config(), wire | {"shared/head.score.weight": wire["shared/head.score.weight"] * float("nan")}),
        "extra": (make_config(), wire | {"shared/more": torch.zeros(1)}),
    }
    for name, (config, tensors) in spoiled.items():
        save_model(tmp_path / name, config, tensors)
        with pytest.raises(BadInputError, match="not the weights that"):
            load(tmp_path / name)


def test_a_failed_write_leaves_no_partial_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_configuration_may_have_been_saved_with_a_mark_and_other_line_ends(saved, config):
    path = saved[0] / "model.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load(saved[0]).config == config
