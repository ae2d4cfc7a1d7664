"""One budget for one data set: whatever the data are called, wherever they lie, whatever became of the ledger."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from test_node_directory import edit, make, spend  # noqa: F401

from conclave.base.errors import BadInputError
from conclave.clients.folder.node_directory import NodeDirectory
from conclave.privacy.ledger import Ledger
from conclave.privacy.ledger.upkeep import registry as claims
from conclave.privacy.ledger.upkeep.birth_time import birth_time
from conclave.privacy.ledger.upkeep.data_place import fingerprint, look_at

AGAIN = "has a ledger already|have a ledger already"


@pytest.fixture
def data(tmp_path):
    """Two data sets, each a file in a folder of its own."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.csv").write_text(f"x,y\n{name},0\n")
    return tmp_path


def point(node, to) -> NodeDirectory:
    """Let node.toml name another place."""
    return edit(node, f'data = "{node.config.dataset.data}"', f'data = "{Path(to)}"')


def linked(data):
    """Every other way to the file of the first data set that this machine offers."""
    (data / "link").symlink_to(data / "one" / "rows.csv")
    (data / "folder-link").symlink_to(data / "one")
    (data / "hard").mkdir()
    os.link(data / "one" / "rows.csv", data / "hard" / "other.csv")
    (data / "inside").mkdir()
    (data / "inside" / "deep").mkdir()
    (data / "inside" / "deep" / "rows.csv").symlink_to(data / "one" / "rows.csv")
    (data / "folder-inside").mkdir()
    (data / "folder-inside" / "part").symlink_to(data / "one")
    return [
        data / "one" / "rows.csv",
        data / "link",
        data / "folder-link" / "rows.csv",
        data / "folder-link",
        data / "hard" / "other.csv",
        data / "hard",
        data / "inside",
        data / "folder-inside",
        data / "two" / ".." / "one" / "rows.csv",
        f"{data}/one/",
        data / "one",
        data,
    ]


@pytest.mark.parametrize("way", range(12))
@pytest.mark.parametrize("whole", [False, True])
def test_the_same_file_has_one_ledger_however_it_is_reached(make, data, way, whole):  # noqa: F811
    make(data="one" if whole else "one/rows.csv")
    again = linked(data)[way]
    with pytest.raises(BadInputError, match=AGAIN):
        make(name="second", dataset="other", data=again, witness="w2")
    second = make(name="second", dataset="other", data="two/rows.csv", witness="w2")
    second.open_ledger().close()
    moved = point(second, again)
    with pytest.raises(BadInputError, match=r"dataset\.data is .*, where this ledger's data did not lie"):
        moved.open_ledger()
    with pytest.raises(BadInputError, match=AGAIN):
        moved.claim_data()
    point(moved, data / "two" / "rows.csv").open_ledger().close()


def test_a_link_that_comes_later_is_found_when_the_ledger_is_opened(make, data):  # noqa: F811
    first, second = make(data="one"), make(name="second", dataset="other", data="two", witness="w2")
    os.link(data / "one" / "rows.csv", data / "two" / "more.csv")
    for node in (first, second):
        with pytest.raises(BadInputError, match=r"overlap .*csv is there too"):
            node.open_ledger()
    (data / "two" / "more.csv").unlink()
    first.open_ledger().close()
    second.open_ledger().close()


def test_data_that_were_renamed_are_still_claimed(make, data):  # noqa: F811
    make(data="one/rows.csv")
    (data / "one" / "rows.csv").rename(data / "renamed.csv")
    with pytest.raises(BadInputError, match=r"renamed\.csv lay at .*rows\.csv before"):
        make(name="second", dataset="other", data="renamed.csv", witness="w2")


@pytest.mark.parametrize("how", ["touched", "a record more"])
def test_data_that_were_renamed_and_changed_are_still_claimed(make, data, how):  # noqa: F811
    """A file is known by when it was born, where the file system tells that; it may have changed since."""
    make(data="one/rows.csv")
    moved = (data / "one" / "rows.csv").rename(data / "renamed.csv")
    if birth_time(moved) is None:
        pytest.skip("this file system does not tell when a file was born")
    if how == "touched":
        os.utime(moved, (1, 1))
    else:
        moved.write_text(f"{moved.read_text()}more,1\n")
    with pytest.raises(BadInputError, match=r"renamed\.csv lay at .*rows\.csv before"):
        make(name="second", dataset="other", data="renamed.csv", witness="w2")


@pytest.mark.parametrize(
    ("then", "now", "same"),
    [
        ("9:5:70", "12:6:70", True),
        ("9:5:70", "9:5:71", False),  # another file that was given the number, and a copied time
        ("9:5", "9:5:70", True),  # as an earlier release wrote it
        ("9:5", "9:6:70", False),
        ("9:5:", "9:5:", True),
        ("9:5:", "9:6:", False),
    ],
)
def test_a_file_is_the_same_by_its_birth_or_where_that_is_unknown_by_size_and_change(data, then, now, same):
    place = replace(look_at(data), known={"1:2": now})
    assert place.seen_in({"1:2": then}) == same
    assert not place.seen_in({"1:3": then})


@pytest.mark.parametrize("born", [7, None])
def test_a_new_file_may_get_the_number_of_one_that_is_gone(make, data, monkeypatch, born):  # noqa: F811
    make(data="one/rows.csv")
    number = (data / "one" / "rows.csv").stat().st_ino
    # Which number a new file gets is the file system's choice: written anew, the old file is one with its number.
    new = (data / "one" / "rows.csv").rename(data / "new.csv")
    new.write_text("x,y\nanother,1\n")
    assert new.stat().st_ino == number
    monkeypatch.setattr("conclave.privacy.ledger.upkeep.data_place.birth_time", lambda path: born)
    make(name="second", dataset="other", data="new.csv", witness="w2")
    assert len(registry_of(data)) == 4  # of each node, its data set's name and the place of its data


@pytest.mark.parametrize(
    "name", ["Ward-7", " ward-7", "ward-7 ", "WARD-7", "\uff57ard-7", "ward-7\t", "ward\u200b-7", "\ufeffward-7"]
)
def test_a_name_is_one_however_it_is_spelled(make, data, name):  # noqa: F811
    make(data="one")
    with pytest.raises(BadInputError, match=AGAIN):
        make(name="second", dataset=name, data="two", witness="w2")


def test_composed_and_decomposed_letters_are_one_name(make, data):  # noqa: F811
    made = [unicodedata.normalize(form, "Stra\u00dfe \u00e9") for form in ("NFC", "NFD")]
    assert made[0] != made[1]
    make(dataset=made[0], data="one")
    with pytest.raises(BadInputError, match=AGAIN):
        make(name="second", dataset=made[1], data="two", witness="w2")
    with pytest.raises(BadInputError, match=AGAIN):
        make(name="second", dataset="STRASSE \u00c9", data="two", witness="w2")


# A ledger that is lost.


@pytest.mark.parametrize("lost", ["folder", "state", "ledger", "held-out ledger", "node.toml and ledgers"])
@pytest.mark.parametrize("rounds", [0, 1])
def test_a_lost_ledger_is_never_begun_anew(make, data, lost, rounds):  # noqa: F811
    node = make(data="one", held_out=0.25)
    spend(node, rounds)
    if lost == "folder":
        shutil.rmtree(node.path)
    elif lost == "state":
        shutil.rmtree(node.state)
    for path in node.state.glob("held-out.db*" if lost == "held-out ledger" else "*.db*"):
        path.unlink()
    (node.path / "node.toml").unlink(missing_ok=True)
    for witness in ("witness", "another"):
        with pytest.raises(BadInputError, match=f"{AGAIN}|its witness"):
            make(data="one", held_out=0.25, witness=witness)
        with pytest.raises(BadInputError, match=AGAIN):
            make(name="second", data="one", held_out=0.25, witness=witness)
        assert not (node.path / "node.toml").exists()


def test_an_attempt_that_never_had_a_ledger_can_be_repeated_in_a_new_folder(make, data, monkeypatch):  # noqa: F811
    """As a killed process leaves it: nothing was taken back."""
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "create", lambda *a, **k: 1 / 0)
        patch.setattr("conclave.clients.folder.node_directory.withdraw", lambda _: None)
        with pytest.raises(ZeroDivisionError):
            make(data="one")
    shutil.rmtree(data / "node")
    with pytest.raises(BadInputError, match="an interrupted node init began it"):
        make(name="second", data="one")
    spend(make(data="one"))


# A registry that is lost, and claims that somebody edited.


def registry_of(data):
    return sorted((data / "registry").iterdir())


def test_a_lost_registry_is_made_up_for_when_ledgers_are_opened(make, data):  # noqa: F811
    node = make(data="one")
    moved = point(node, data / "two")
    moved.claim_data()
    before = [path.read_bytes() for path in registry_of(data)]
    assert len(before) == 3
    for path in registry_of(data):
        path.unlink()
    moved.open_ledger().close()
    assert [path.read_bytes() for path in registry_of(data)] == before
    for place in ("one", "two"):
        with pytest.raises(BadInputError, match=AGAIN):
            make(name="second", dataset="other", data=place, witness="w2")


def test_of_two_ledgers_that_a_lost_registry_let_come_into_being_one_works(make, data):  # noqa: F811
    first = make(data="one")
    for path in registry_of(data):
        path.unlink()
    second = make(name="second", dataset="other", data="one", witness="w2")
    second.open_ledger().close()
    with pytest.raises(BadInputError, match=AGAIN):
        first.open_ledger()


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "null", '{"data": 7}', '{"data": "/x", "ledger": "/y", "seen": 1}']
)
def test_an_unreadable_claim_might_be_about_these_very_data(make, data, content):  # noqa: F811
    node = make(data="one")
    (data / "registry" / "torn.json").write_text(content)
    with pytest.raises(BadInputError, match=r"unreadable claim .*torn\.json"):
        node.open_ledger()
    with pytest.raises(BadInputError, match="unreadable claim"):
        make(name="second", dataset="other", data="two", witness="w2")


def test_a_claim_that_names_another_ledger_is_believed(make, data):  # noqa: F811
    node = make(data="one")
    for path in registry_of(data):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"ledger_ids": ["0" * 32]}))
    with pytest.raises(BadInputError, match=AGAIN):
        node.open_ledger()


def as_before(data):
    """Leave in each claim what an earlier release wrote."""
    for path in registry_of(data):
        document = json.loads(path.read_text())
        path.write_text(json.dumps({key: document[key] for key in document if key in ("dataset", "data", "ledger")}))


def test_claims_of_an_earlier_release_are_taken_over_and_were_spent(make, data):  # noqa: F811
    node = make(data="one")
    (node.state / "data.claims").unlink()
    as_before(data)
    node.path.rename(data / "moved")
    hold = (
        data / "registry",
        "ward-7",
        data / "one",
        claims.Owner(data / "moved" / "state" / "ledger.db", ("0" * 32,)),
    )
    claims.hold(*hold)
    assert all("ledger_ids" in json.loads(path.read_text()) for path in registry_of(data))
    as_before(data)
    shutil.rmtree(data / "moved")
    with pytest.raises(BadInputError, match=AGAIN):
        make(data="one", witness="another")


def test_the_registry_is_where_it_was_though_the_users_folders_are_others_now(make, data, monkeypatch):  # noqa: F811
    node = make(data="one")
    monkeypatch.setenv("XDG_STATE_HOME", str(data / "elsewhere"))
    node.open_ledger().close()
    assert not (data / "elsewhere" / "conclave").exists()


def test_a_claim_that_cannot_be_refreshed_stands(make, data, monkeypatch):  # noqa: F811
    """A service may see a read-only system."""
    node = make(data="one")
    (data / "one" / "more.csv").write_text("x,y\n3,4\n")
    monkeypatch.setattr(claims, "write_atomically", lambda *a, **k: os.write(-1, b""))
    node.open_ledger().close()
    registry_of(data)[0].unlink()
    monkeypatch.setattr(claims, "new_file", lambda *a, **k: os.write(-1, b""))
    with pytest.raises(BadInputError, match="cannot be written"):
        node.open_ledger()


# Data and folders that move.


def test_data_move_by_the_owners_word_and_both_places_stay_the_ledgers(make, data):  # noqa: F811
    node = make(data="one")
    spend(node)
    moved = point(node, data / "two")
    with pytest.raises(BadInputError, match="conclave node claim says that they have moved"):
        moved.open_ledger()
    moved.claim_data()
    spend(moved)
    point(moved, data / "one").open_ledger().close()
    for place in ("one", "two"):
        with pytest.raises(BadInputError, match=AGAIN):
            make(name="second", dataset="other", data=place, witness="w2")


def test_new_records_at_the_same_place_are_paid_for_by_the_same_ledger(make, data):  # noqa: F811
    node = make(data="one")
    spend(node)
    spent = node.open_ledger().epsilon_spent
    (data / "one" / "more.csv").write_text("x,y\n3,4\n")
    (data / "one" / "rows.csv").unlink()
    assert node.open_ledger().epsilon_spent == spent


def test_a_moved_node_works_and_a_copied_one_does_not(make, data):  # noqa: F811
    node = make(data="one")
    spend(node)
    shutil.copytree(node.path, data / "copy")
    copy = NodeDirectory(data / "copy")
    with pytest.raises(BadInputError, match="is a copy of"):
        copy.open_ledger()
    node.open_ledger().close()
    shutil.rmtree(node.path)
    spend(copy)
    copy.path.rename(data / "moved")
    spend(NodeDirectory(data / "moved"))


def test_two_names_of_one_ledger_in_two_folders_are_two_ledgers(make, data):  # noqa: F811
    """Each would keep its own log beside its name, and neither see what the other spends."""
    node = make(data="one")
    shutil.copytree(node.path, data / "twin", copy_function=os.link)
    with pytest.raises(BadInputError, match="is a copy of"):
        NodeDirectory(data / "twin").open_ledger()
    node.open_ledger().close()


def test_a_copy_with_a_witness_of_its_own_has_no_second_budget(make, data):  # noqa: F811
    node = make(data="one")
    spend(node)
    shutil.copytree(node.path, data / "copy")
    shutil.copytree(data / "elsewhere", data / "copy" / "witness")
    copy = edit(NodeDirectory(data / "copy"), str(data / "elsewhere"), str(data / "copy" / "witness"))
    with pytest.raises(BadInputError, match="is a copy of"):
        copy.open_ledger()
    copy.restore()  # by the owner's word this one goes on, and the other no longer does
    copy.open_ledger().close()
    with pytest.raises(BadInputError, match="is a copy of"):
        node.open_ledger()


def test_the_sides_of_one_data_set_share_its_claim(make, data):  # noqa: F811
    node = make(data="one", held_out=0.25)
    for side in node.sides:
        node.open_ledger(side).close()
    assert len(registry_of(data)) == 2


# What a place is, and what its owner sees of it.


def test_a_folder_that_links_to_itself_is_looked_at_once(data):
    (data / "one" / "loop").symlink_to(data / "one")
    (data / "one" / "nowhere").symlink_to(data / "none")
    os.mkfifo(data / "one" / "pipe")
    assert [path.name for path in look_at(data / "one").files.values()] == ["one", "rows.csv"]


def test_empty_files_are_nobodys(make, data):  # noqa: F811
    (data / "one" / "empty").touch()
    os.link(data / "one" / "empty", data / "two" / "empty")
    make(data="one")
    make(name="second", dataset="other", data="two", witness="w2")
    assert len(registry_of(data)) == 4  # both are claimed: of each node, its data set's name and the place of its data


def test_a_fingerprint_is_of_what_files_hold_and_not_of_their_names(data):
    (data / "one" / "more.csv").write_text("more")
    first = fingerprint(data / "one")
    shutil.copytree(data / "one", data / "copy")
    (data / "copy" / "more.csv").rename(data / "copy" / "a.csv")
    assert fingerprint(data / "copy") == first != fingerprint(data / "two")
    (data / "copy" / "a.csv").write_text("More")
    assert fingerprint(data / "copy") != first
    assert fingerprint(data / "two") == fingerprint(data / "two" / "rows.csv")


def test_no_fingerprint_is_kept_anywhere(make, data):  # noqa: F811
    node = make(data="one")
    spend(node)
    shown = fingerprint(data / "one")
    for path in data.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert shown.encode() not in content, path
            assert bytes.fromhex(shown) not in content, path
