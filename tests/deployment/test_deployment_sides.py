"""A node's records keep their sides, whatever reads them; what they are known by never leaves it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import pickle
import tarfile

import numpy as np
import pytest
from format_samples import png
from test_deployment_node import edit, problems, scenario

from conclave.base.errors import BadInputError
from conclave.clients.folder.backup import back_up
from conclave.clients.folder.node_directory import NodeDirectory, create_node
from conclave.data.formats import image_folder
from conclave.data.values import features
from conclave.deployment.node import loading as node_loading
from conclave.deployment.node.loading import open_node, read_data
from conclave.model import parameters
from conclave.model.building import build
from conclave.protocol.charges import charges_of
from conclave.protocol.codec import encode
from conclave.protocol.messages import EvaluateRequest, TrainRequest
from conclave.protocol.tensor_array import pack

COUNT = 60


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make a node of these data; its split is fixed, for at random all of 20 groups may train (3 times in 1,000)."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("conclave.clients.folder.node_directory.secrets.token_hex", lambda size: "07" * size)

    def made(data, text, **dataset):
        create_node(
            tmp_path / "node",
            dataset={"id": "rows", "data": str(data), "declared_size": COUNT, "held_out": 0.25, **dataset},
            budget={"epsilon": 4.0, "delta": 1e-5},
            storage={"witness": str(tmp_path / "witness"), "machine": "m"},
        )
        edit(tmp_path / "node", "# [format]", f"[format]\n{text}\n#")
        return tmp_path / "node"

    return made


def rows(path, delimiter=",", more=""):
    """60 patients of 20 doctors, each with a label of their own, by which tests know them."""
    draw = np.random.default_rng(0).normal(size=(COUNT, 4))
    lines = [delimiter.join(["a", "b", "c", "d", "doctor", "y"]) + more]
    for n, values in enumerate(draw):
        lines.append(delimiter.join([*map(repr, map(float, values)), f"dr{n % 20}", str(n)]) + more)
    path.write_text("\n".join(lines) + "\n")


CSV = f'kind = "csv"\nlabel = "y"\nclasses = {COUNT}\nfeatures = ["a", "b", "c", "d"]\n'


@pytest.fixture
def table(make, tmp_path):
    rows(tmp_path / "rows.csv")
    return make(tmp_path / "rows.csv", CSV)


def sides(folder):
    node = open_node(NodeDirectory(folder))
    found = [set(records["label"].tolist()) for records in (node.records, node.held_out.records)]
    assert not found[0] & found[1]
    assert all(found)
    return found


def work(folder):
    """Let the node's ledger have an entry."""
    node = open_node(NodeDirectory(folder))
    node.ledger.admit(charges_of(scenario().plan())["train"].request("1", seeded=False), 1)
    return node


def test_a_side_is_the_keyed_hash_of_what_is_stored(table):
    genesis = open_node(NodeDirectory(table)).ledger.genesis
    _, aside = sides(table)
    for n, line in enumerate((table.parent / "rows.csv").read_bytes().splitlines()[1:]):
        cells = line.split(b",")
        lengths = b"".join(len(cell).to_bytes(8, "little") for cell in cells)
        known_by = hashlib.sha256((6).to_bytes(8, "little") + lengths + b"".join(cells)).digest()
        word = hmac.new(bytes.fromhex(genesis.split_key), known_by, "sha256").digest()[:8]
        assert (n in aside) == (int.from_bytes(word, "big") < 2**62)


@pytest.mark.parametrize("worked", [False, True])
def test_another_scale_other_features_and_an_upgraded_reader_move_nobody(table, worked, monkeypatch):
    before = sides(table)
    if worked:
        work(table)
    edit(
        table,
        'features = ["a", "b", "c", "d"]',
        'features = ["c", "a"]\nscale = 4.0\ncenter = 1.0\ngroup_by = "doctor"',
    )
    assert sides(table) == before
    monkeypatch.setattr(features, "number_of", lambda value, _: round(float(value), 1))
    assert sides(table) == before


def test_another_decoder_of_pictures_moves_nobody(make, tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    for n in range(COUNT):
        (tmp_path / "a" / str(n)).mkdir(parents=True)
        picture = draw.integers(0, 256, (12, 12, 3)).astype(np.uint8)
        (tmp_path / "a" / str(n) / "1.jpg").write_bytes(png(picture, "JPEG"))
    folder = make(tmp_path / "a", f'kind = "image-folder"\nheight = 8\nwidth = 8\nclasses = {COUNT}')
    before, pixels = sides(folder), work(folder).records["image"]
    decoded = image_folder.picture_from
    monkeypatch.setattr(image_folder, "picture_from", lambda *a: (decoded(*a) + np.float32(1 / 255)).clip(0, 1))
    assert sides(folder) == before
    assert not (open_node(NodeDirectory(folder)).records["image"] == pixels).all()
    edit(folder, "height = 8", "height = 16")
    assert sides(folder) == before


def test_what_would_store_every_record_otherwise_is_refused_once_the_node_has_run(table, tmp_path):
    refused = "records would change between training and held-out"
    before = sides(table)
    rows(tmp_path / "rows.csv", more=",0")
    assert sides(table) != before  # nothing was charged yet
    rows(tmp_path / "rows.csv")
    work(table)
    assert "data" not in problems(table)
    rows(tmp_path / "rows.csv", more=",0")
    assert refused in problems(table)["data"]
    with pytest.raises(BadInputError, match=refused):
        open_node(NodeDirectory(table))
    rows(tmp_path / "rows.csv", delimiter=";")
    edit(table, 'kind = "csv"', 'kind = "csv"\ndelimiter = ";"')
    with pytest.raises(BadInputError, match=refused):
        open_node(NodeDirectory(table))
    edit(table, '\ndelimiter = ";"', "")
    rows(tmp_path / "rows.csv")
    assert sides(table) == before
    (table / "state" / "held-out.layout").unlink()
    with pytest.raises(BadInputError, match="restore it"):
        open_node(NodeDirectory(table))


def test_a_backup_goes_on_with_the_same_sides(table, tmp_path):
    before = sides(table)
    work(table).ledger.close()
    back_up(NodeDirectory(table), tmp_path / "backup.tar")
    for path in (table / "node.toml", *(table / "state").glob("*")):
        path.unlink()
    with tarfile.open(tmp_path / "backup.tar") as archive:
        archive.extractall(table, filter="data")
    assert sides(table) == before


def test_a_version_that_hashes_otherwise_refuses_a_node_that_has_run(table, monkeypatch):
    work(table)
    monkeypatch.setattr("conclave.data.private_data.SCHEME", "2")
    with pytest.raises(BadInputError, match="records would change between training and held-out"):
        open_node(NodeDirectory(table))


def test_groups_keep_their_sides_by_their_names_and_other_groups_are_refused(make, tmp_path):
    rows(tmp_path / "rows.csv")
    folder = make(tmp_path / "rows.csv", f'{CSV}group_by = "doctor"', unit="group")
    before = sides(folder)
    assert all({n % 20 for n in side} == {n % 20 for n in side if n < 20} for side in before)
    work(folder)
    edit(folder, '["a", "b", "c", "d"]', '["d"]\nscale = 3.0')
    rows(tmp_path / "rows.csv", more=",0")  # more is stored of each record, but groups have the same names
    assert sides(folder) == before
    edit(folder, 'group_by = "doctor"', 'group_by = "a"')
    with pytest.raises(BadInputError, match="stored or grouped otherwise"):
        open_node(NodeDirectory(folder))


def spellings(secret: bytes) -> set[bytes]:
    """A hash in every form in which a message, a log or a file might hold it; half of it is enough."""
    half = secret[:16]
    found = {half, half[::-1], half.hex().encode(), half.hex().upper().encode(), base64.b64encode(half)[:20]}
    return found | {repr(half)[2:-1].encode(), ", ".join(map(str, half)).encode(), ",".join(map(str, half)).encode()}


def said_and_kept(folder, caplog) -> bytes:
    """Train and measure for a round: all that the node answered and logged, and every file that it has now."""
    edit(folder, "# unapproved_plans = true", "unapproved_plans = true")
    edit(folder, "# metrics = 1.0", "metrics = 1.0")
    edit(folder, "min_noise_multiplier = 0.3", "min_noise_multiplier = 0.0")
    asked = scenario(**{"model.head.classes": COUNT, "evaluation": {"every": 1}}).plan()
    with caplog.at_level(logging.DEBUG):
        node = open_node(NodeDirectory(folder))
        network = build(asked.model, 1)
        sent = parameters.split(network.state_dict(), network.held)
        common = {"run_id": "1", "scenario": "rows", "round": 1, "plan": asked, "held": network.held}
        answers = []
        for request, answer in ((TrainRequest(**common), node.train), (EvaluateRequest(**common), node.evaluate)):
            answers.append(answer(request, encode(request, pack(sent))))
        answers.append(node.describe().model_dump_json())
    said = b"".join(pickle.dumps(answer) for answer in answers) + repr(node).encode() + caplog.text.encode()
    kept = [file for file in folder.parent.rglob("*") if file.is_file() and file.name != "rows.csv"]
    assert len(kept) > 5
    assert [entry.state for entry in node.held_out.ledger.entries()][-1] == "COMMITTED"
    return said + b"".join(file.read_bytes() for file in kept)


def secrets_of(folder) -> list[bytes]:
    """What records are known by, and what their sides are told from."""
    key = bytes.fromhex(open_node(NodeDirectory(folder)).ledger.genesis.split_key)
    known_by = [bytes(row) for row in read_data(NodeDirectory(folder)).identity_N]
    assert len(set(known_by)) == COUNT
    return known_by + [hmac.digest(key, one, "sha256") for one in known_by]


def test_what_records_are_known_by_is_in_no_message_no_log_and_no_file(table, caplog):
    everything = said_and_kept(table, caplog)
    assert not [one for one in secrets_of(table) if any(form in everything for form in spellings(one))]
    assert "identity" not in repr(read_data(NodeDirectory(table)))


@pytest.mark.parametrize(
    "spell", [bytes.hex, repr, lambda one: str(list(one)), lambda one: base64.b64encode(one).decode()]
)
def test_the_test_would_see_it(table, caplog, spell, monkeypatch):
    divide = node_loading.sides_of

    def telling(records, genesis, identities):
        identities = list(identities)
        logging.getLogger("conclave.node").info("%s", spell(identities[7]))
        return divide(records, genesis, identities)

    monkeypatch.setattr(node_loading, "sides_of", telling)
    everything = said_and_kept(table, caplog)
    assert any(form in everything for form in spellings(secrets_of(table)[7]))
