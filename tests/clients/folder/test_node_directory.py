"""A node's folder: what the owner decided, the ledger it is bound to, and every reason not to start."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import stat
import tomllib

import pytest
from ledger_samples import request

from conclave.base.errors import BadInputError
from conclave.clients.folder.node_config import BudgetConfig, DatasetConfig, StorageConfig, read_node_config
from conclave.clients.folder.node_directory import NodeDirectory, create_node
from conclave.clients.policy import Policy
from conclave.privacy.ledger import BudgetExhaustedError, Ledger, Reservation
from conclave.privacy.ledger.genesis import check_pair
from conclave.privacy.ledger.heads import public_hex
from conclave.privacy.ledger.keys import load_key
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.spending import budget_of
from conclave.privacy.ledger.reading.verification import audit_history


@pytest.fixture
def make(tmp_path):
    def build(name="node", dataset="ward-7", data="data", witness="witness", held_out=0.0, **budget) -> NodeDirectory:
        return NodeDirectory.create(
            tmp_path / name,
            dataset=DatasetConfig(id=dataset, data=tmp_path / data, declared_size=1000, held_out=held_out),
            budget=BudgetConfig(**({"epsilon": 8.0, "delta": 1e-5} | budget)),
            storage=StorageConfig(witness=tmp_path / "elsewhere" / witness, machine="machine-a"),
            registry=tmp_path / "registry",
        )

    return build


def spend(node: NodeDirectory, rounds: int = 1) -> None:
    ledger = node.open_ledger()
    done = sum(entry.state == "RESERVED" for entry in ledger.entries())
    for number in range(done + 1, done + rounds + 1):
        reservation = ledger.reserve(request(number), bytes(32))
        assert isinstance(reservation, Reservation)
        ledger.commit(reservation, b"reply")
    ledger.close()


def edit(node: NodeDirectory, old: str, new: str) -> NodeDirectory:
    path = node.path / "node.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return NodeDirectory(node.path)


def test_a_new_node_has_a_deployment_ledger_with_the_budget_it_states(make):
    node = make()
    genesis = LedgerFile(node.training.path).genesis
    assert (genesis.mode, genesis.dataset_id, genesis.unit) == ("deployment", "ward-7", "record")
    assert (genesis.epsilon, genesis.delta, genesis.order) == ("8", "0.00001", "3.4")
    assert genesis.public_key == public_hex(load_key(node.training.key_path))
    for path in (node.training.path, node.training.key_path, node.training.witness.path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(node.training.path.parent.stat().st_mode) == 0o700
    spend(node, 3)
    audit = audit_history(LedgerFile(node.training.path), witness=node.training.witness.read())
    assert (audit.findings, audit.charges, audit.seeded) == ([], 3, False)


def test_the_written_configuration_says_what_the_defaults_are(make, tmp_path):
    node = make(dataset='odd "name" \\ and\ttab')
    assert node.config.dataset.id == 'odd "name" \\ and\ttab'
    assert node.config.policy == Policy()
    assert tomllib.loads((node.path / "node.toml").read_text())["policy"]["releases"] == {"delta": 1.0}
    assert read_node_config(node.path / "node.toml") == node.config


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("epsilon = 8.0", "epsilon = 80.0", "budget.epsilon is 80, must be 8: the ledger was created with it"),
        ("delta = 1e-05", "delta = 1e-3", "budget.delta is 0.001, must be 0.00001"),
        ('id = "ward-7"', 'id = "ward-8"', "dataset.id is ward-8, must be ward-7"),
        ('unit = "record"', 'unit = "group"', "dataset.unit is group, must be record"),
        ('machine = "machine-a"', 'machine = "machine-b"', "belongs to another machine"),
    ],
)
def test_what_the_ledger_fixes_cannot_be_edited(make, old, new, sentence):
    node = edit(make(), old, new)
    with pytest.raises(BadInputError, match=sentence):
        node.open_ledger()


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("max_rounds = 10000", "max_round = 10000", "policy.max_round, the nearest known key is policy.max_rounds"),
        ("max_rounds = 10000", 'max_rounds = "10000"', "policy.max_rounds is '10000'"),
        ("max_rounds = 10000", "max_rounds = 0", "policy.max_rounds is 0"),
        ("max_rounds = 10000", "simulation = true", "policy.simulation is true, must not be set"),
        ("delta = 1.0", "delta = 1.5", "is 1.5"),
        ("declared_size = 1000", "", "dataset.declared_size is missing"),
        ("[budget]", "[budget", "not TOML"),
        ("max_rounds = 10000", f"max_rounds = {'9' * 5001}", "an integer is too long, must have at most 64 bits"),
        ("max_rounds = 10000", f"max_rounds = 0x{'f' * 5001}", "an integer is too long, must have at most 64 bits"),
        ('state = "state"', r'state = "a\u0000"', "has the character U+0000"),
        ("max_rounds = 10000", f"max_rounds.{'a.' * 3000}b = 1", "nested too deeply, must be at most 64"),
        ("[limits]", '[server]\naddress = "a..b:1"\nca = "ca.pem"\n[limits]', "server.address: must be host:port"),
        ("# metrics_port = 9464", 'metrics_port = 9094\n[server]\naddress = "fed:1"\nca = "ca.pem"',
         "monitoring.metrics_port is 9094, must be another than server.internal_port"),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_one_sentence(make, old, new, sentence):
    node = make()
    with pytest.raises(BadInputError) as caught:
        edit(node, old, new)
    assert str(caught.value).startswith(str(node.path / "node.toml"))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(BadInputError, match=r"node\.toml: cannot be read"):
        NodeDirectory(tmp_path)


def test_a_dataset_gets_one_ledger(make):
    make()
    with pytest.raises(BadInputError, match="dataset ward-7 has a ledger already"):
        make(name="second", data="other", witness="w2")
    with pytest.raises(BadInputError, match=r"the data .* has a ledger already"):
        make(name="third", dataset="ward-8", witness="w3")
    with pytest.raises(BadInputError, match="exists already"):
        make()
    make(name="fourth", dataset="ward-9", data="more", witness="w4")


def test_deleting_a_spent_ledger_does_not_bring_the_budget_back(make, tmp_path):
    node = make()
    spend(node, 2)
    shutil.rmtree(node.path)
    for witness in ("witness", "another"):
        with pytest.raises(BadInputError, match=r"has a ledger already .* it is lost and must be restored"):
            make(witness=witness)
    for claim in (tmp_path / "registry").iterdir():
        claim.unlink()
    with pytest.raises(BadInputError, match="is the witness of a ledger already"):
        make()  # no claim is left, but the witness remembers
    assert not (node.path / "node.toml").exists()


def test_an_interrupted_creation_can_be_repeated(make, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "create", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make()
    with monkeypatch.context() as patch:  # the witness was written, the ledger not
        link = os.link
        patch.setattr("os.link", lambda a, b: 1 / 0 if b.name == "ledger.db" else link(a, b))
        with pytest.raises(ZeroDivisionError):
            make()
    spend(make())


def test_a_restored_backup_does_not_start_and_restoring_it_costs_the_rest(make, tmp_path):
    node = make()
    spend(node, 1)
    backup = tmp_path / "backup"
    shutil.copytree(node.path / "state", backup)
    spend(node, 2)
    shutil.rmtree(node.path / "state")
    shutil.copytree(backup, node.path / "state")
    with pytest.raises(BadInputError, match="its witness has seen entry 6: this is an older copy"):
        node.open_ledger()
    recovery = node.restore()
    assert not recovery.proven
    ledger = node.open_ledger()
    assert ledger.epsilon_spent == pytest.approx(8.0, abs=1e-9)
    with pytest.raises(BudgetExhaustedError):
        ledger.reserve(request(9), bytes(32))
    ledger.close()
    assert audit_history(LedgerFile(node.training.path), witness=node.training.witness.read()).findings == []


def test_a_move_to_another_machine_with_its_witness_costs_nothing(make):
    node = make()
    spend(node, 2)
    moved = edit(node, 'machine = "machine-a"', 'machine = "machine-b"')
    assert moved.restore().proven
    spend(moved, 1)
    back = edit(moved, 'machine = "machine-b"', 'machine = "machine-a"')
    with pytest.raises(BadInputError, match="another machine"):
        back.open_ledger()


def test_a_lost_witness_stops_the_node(make):
    node = make()
    node.training.witness.path.unlink()
    with pytest.raises(BadInputError, match="is missing, so entries may have been lost"):
        node.open_ledger()


def test_rotating_the_key_survives_a_crash_at_either_side(make, monkeypatch):
    node = make()
    before = node.training.key_path.read_bytes()
    with monkeypatch.context() as patch:  # the new key was written, the ledger did not hear of it
        patch.setattr(Ledger, "rotate_key", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            node.rotate_key()
    spend(node)
    assert node.training.key_path.read_bytes() == before
    with monkeypatch.context() as patch:  # the ledger has the new key, its file was not renamed
        rename = type(node.training.key_path).replace
        patch.setattr(
            type(node.training.key_path), "replace", lambda a, b: 1 / 0 if b == node.training.key_path else rename(a, b)
        )
        with pytest.raises(ZeroDivisionError):
            node.rotate_key()
    spend(node)
    assert node.training.key_path.read_bytes() != before
    public = node.rotate_key()
    assert public_hex(load_key(node.training.key_path)) == public
    spend(node)
    audit = audit_history(LedgerFile(node.training.path), witness=node.training.witness.read())
    assert (audit.findings, audit.rotations, audit.charges) == ([], 2, 3)


def test_a_budget_that_allows_nothing_is_refused(make):
    with pytest.raises(BadInputError, match="must be larger to allow any release"):
        make(epsilon=1e-4, delta=1e-12)


def test_decisions_of_a_command_line_are_checked_like_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    given = {
        "dataset": {"id": "d", "data": str(tmp_path), "unit": "record", "declared_size": 5},
        "budget": {"epsilon": 8.0, "delta": 1e-5},
        "storage": {"witness": str(tmp_path / "w"), "machine": "m"},
    }
    with pytest.raises(BadInputError, match=r"budget\.delta is 2\.0"):
        create_node(tmp_path / "n", **(given | {"budget": {"epsilon": 8.0, "delta": 2.0}}))
    create_node(tmp_path / "n", **given)
    claims = [json.loads(path.read_bytes()) for path in (tmp_path / "home" / "conclave" / "datasets").iterdir()]
    assert {"dataset", "data"} < {key for claim in claims for key in claim}
    ledger = LedgerFile(tmp_path / "n" / "state" / "ledger.db")
    assert {(*claim["ledger_ids"], claim["ledger"], claim["used"]) for claim in claims} == {
        (ledger.genesis.ledger_id, str(ledger.path.resolve()), True)
    }


@pytest.mark.parametrize("key", ["data", "witness"])
def test_paths_that_are_no_text_are_refused_before_anything_is_written(tmp_path, monkeypatch, key):
    """Those of another encoding reach Python so, as may the folder that a relative one is in."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    paths = {"data": "data", "witness": "witness"} | {key: "caf\udce9/it"}
    with pytest.raises(BadInputError) as caught:
        create_node(
            tmp_path / "node",
            dataset={"id": "d", "data": paths["data"], "declared_size": 10},
            budget={"epsilon": 8.0, "delta": 1e-5},
            storage={"witness": paths["witness"], "machine": "m"},
        )
    assert str(caught.value) == rf"{tmp_path}/node: caf\udce9… is no text in UTF-8, must be a name or path that is"
    assert list(tmp_path.iterdir()) == []


def test_where_the_witness_cannot_be_written_nothing_goes_on(make, monkeypatch):
    """The entry is in the ledger, but whoever acted on it could lose it to an older copy: so nobody does."""
    node = make()
    ledger = node.open_ledger()
    with monkeypatch.context() as patch:
        patch.setattr("conclave.privacy.ledger.witness.write_atomically", lambda *a, **k: os.write(-1, b""))
        with pytest.raises(BadInputError, match="cannot be written"):
            ledger.reserve(request(1), b"1" * 32)
    assert node.training.witness.read().seq == 0
    assert ledger.reserve(request(1), b"2" * 32).secret == b"1" * 32  # and now the witness follows first
    assert node.training.witness.read().seq == 1
    ledger.close()


def test_held_out_units_have_a_ledger_of_their_own_with_the_same_budget(make):
    node = make(held_out=0.25)
    training, aside = node.training.genesis, node.held_out.genesis
    check_pair(training, aside)
    assert (aside.held_out, aside.side, aside.epsilon, aside.delta) == ("0.25", "held-out", "8", "0.00001")
    assert training.public_key != aside.public_key
    assert len(training.split_key) == 64
    for path in (node.held_out.path, node.held_out.key_path, node.held_out.witness.path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for side, files in (("training", node.training), ("held-out", node.held_out)):
        ledger = node.open_ledger(side)
        ledger.reserve(request(1), bytes(32))
        ledger.close()
        assert audit_history(LedgerFile(files.path), witness=files.witness.read()).charges == 1


def test_a_node_that_holds_nothing_out_has_one_ledger(make):
    node = make()
    assert node.held_out is None
    assert sorted(path.name for path in node.training.path.parent.glob("*.db")) == ["ledger.db"]
    with pytest.raises(BadInputError, match=r"held_out is 0"):
        node.open_ledger("held-out")


@pytest.mark.parametrize("stated", ["0.5", "0.0"])
def test_the_share_that_is_held_out_is_fixed(make, stated):
    """Another share would move units from one side to the other."""
    node = edit(make(held_out=0.25), "held_out = 0.25", f"held_out = {stated}")
    with pytest.raises(BadInputError, match=f"dataset.held_out is {stated.removesuffix('.0')}, must be 0.25"):
        node.open_ledger()


def test_holding_out_cannot_begin_later(make):
    node = edit(make(), "held_out = 0.0", "held_out = 0.25")
    with pytest.raises(BadInputError, match=r"held_out is 0\.25, must be 0:"):
        node.open_ledger()
    with pytest.raises(BadInputError, match="held-out"):
        node.open_ledger("held-out")


def test_each_ledger_has_its_keys_and_its_restoring(make):
    node = make(held_out=0.25)
    before = node.training.key_path.read_bytes()
    public = node.rotate_key("held-out")
    assert public == public_hex(load_key(node.held_out.key_path)) != node.held_out.genesis.public_key
    assert node.training.key_path.read_bytes() == before
    ledger = node.open_ledger("held-out")
    ledger.reserve(request(1), bytes(32))
    ledger.close()
    node.held_out.witness.path.unlink()
    with pytest.raises(BadInputError, match="witness"):
        node.open_ledger("held-out")
    assert not node.restore(side="held-out").proven
    assert budget_of(LedgerFile(node.held_out.path)).spent == pytest.approx(8.0)
    assert budget_of(LedgerFile(node.training.path)).spent == 0.0


def test_a_creation_interrupted_between_the_two_ledgers_can_be_repeated(make, monkeypatch):
    real, made = Ledger.create.__func__, []

    def create(cls, *args, **options):
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return real(cls, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "create", classmethod(create))
        with pytest.raises(KeyboardInterrupt):
            make(held_out=0.25)
    with pytest.raises(BadInputError, match="has a ledger already"):
        make(name="second")
    node = make(held_out=0.25)
    check_pair(node.training.genesis, node.held_out.genesis)
    node.open_ledger("held-out").close()
    spend(node)


def test_closing_a_run_is_for_both_sides(make):
    node = make(held_out=0.25)
    for side in ("training", "held-out"):
        ledger = node.open_ledger(side)
        ledger.admit(request(1), 2)
        ledger.close()
    assert node.close_plans("7") == 2
    assert node.close_plans("7") == 0


def test_a_budget_that_is_refused_leaves_the_dataset_free(make, tmp_path):
    with pytest.raises(BadInputError, match="must be larger to allow any release"):
        make(name="first", epsilon=1e-9)
    assert not (tmp_path / "first").exists()
    make(name="second")


def test_a_failed_creation_leaves_the_dataset_free_and_a_begun_ledger_keeps_it(make, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "taken").write_text("no witness")
    with pytest.raises(BadInputError, match="not a witness"):
        make(name="first", witness="taken")
    with monkeypatch.context() as patch:
        patch.setattr("conclave.clients.folder.node_directory.create_node_key", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(name="second")
    with pytest.raises(BadInputError, match="has a ledger already"):
        make(name="third")
    make(name="second")


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_a_creation_interrupted_after_its_ledgers_is_completed_by_the_same_again(make, monkeypatch, held_out):
    for step in ("create_node_key", "write_atomically"):
        with monkeypatch.context() as patch:
            patch.setattr(f"conclave.clients.folder.node_directory.{step}", lambda *a: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                make(held_out=held_out)
    node = make(held_out=held_out)
    assert node.node_key.with_name("node.key.pub").exists()
    if held_out:
        check_pair(node.training.genesis, node.held_out.genesis)
        node.open_ledger("held-out").close()
    spend(node)


def test_what_an_interrupted_creation_left_is_kept_for_the_same_decisions_only(make, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("conclave.clients.folder.node_directory.write_atomically", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make()
    with pytest.raises(BadInputError, match="begun with the same decisions"):
        make(epsilon=9.0)
    with pytest.raises(BadInputError, match=r"its witness .* is missing"):
        make(witness="another")
    node = make()
    spend(node)
    (node.path / "node.toml").unlink()
    with pytest.raises(BadInputError, match="never used"):
        make()


def test_a_torn_next_key_is_ignored_and_the_change_of_keys_done_anew(make):
    node = make()
    before = node.training.key_path.read_bytes()
    torn = node.state / "ledger.key.next"
    torn.touch(mode=0o600)
    torn.write_bytes(before[:40])
    spend(node)
    assert node.training.key_path.read_bytes() == before
    public = node.rotate_key()
    assert public_hex(load_key(node.training.key_path)) == public
    assert not torn.exists()
    spend(node)


def test_a_next_key_that_others_may_read_is_not_ignored(make):
    """It may be the one in force."""
    node = make()
    (node.state / "ledger.key.next").write_bytes(node.training.key_path.read_bytes())
    (node.state / "ledger.key.next").chmod(0o644)
    with pytest.raises(BadInputError, match="mode 0644"):
        node.open_ledger()


def test_another_users_node_is_refused_before_anything_is_written(make, monkeypatch):
    node = make()
    before = sorted(node.path.rglob("*"))
    monkeypatch.setattr("os.geteuid", lambda: node.state.stat().st_uid + 1)
    owner = pwd.getpwuid(node.state.stat().st_uid).pw_name
    with pytest.raises(BadInputError, match=f"{node.state}: belongs to user {owner}, run this as {owner}"):
        NodeDirectory(node.path)
    (node.path / "node.toml").unlink()
    with pytest.raises(BadInputError, match="belongs to user"):
        make()
    assert sorted(node.path.rglob("*")) == [path for path in before if path.name != "node.toml"]


def test_without_a_state_the_nodes_folder_says_whose_it_is(make, monkeypatch):
    node = make()
    node.state.rename(node.path / "lost")
    NodeDirectory(node.path)
    monkeypatch.setattr("os.geteuid", lambda: node.path.stat().st_uid + 1)
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])  # a container's user has no name here
    with pytest.raises(BadInputError, match=f"{node.path}: belongs to user {node.path.stat().st_uid}"):
        NodeDirectory(node.path)
