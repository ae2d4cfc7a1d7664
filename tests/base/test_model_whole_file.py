"""A new file is whole or not there, and never takes the place of another one."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from conclave.base.whole_file import new_file, sync_folder


def test_a_new_file_is_there_once_it_is_whole(tmp_path):
    path = tmp_path / "file"
    with new_file(path, mode=0o600) as stream:
        stream.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_there_is_nothing_and_the_next_try_works(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError, match="No space"):
        write(path, b"to", lambda: fail(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []
    write(path, b"whole")
    assert path.read_bytes() == b"whole"


def test_an_error_names_the_file_that_was_to_be_and_not_the_one_on_the_way(tmp_path):
    """Of a full disk the system names none; of a folder that is not there, the one on the way."""
    for path, cause in ((tmp_path / "file", lambda: fail(errno.ENOSPC)), (tmp_path / "no" / "file", lambda: None)):
        with pytest.raises(OSError, match="No s") as caught:
            write(path, b"to", cause)
        assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as caught:  # what the block itself reads keeps its name
        write(tmp_path / "file", b"to", (tmp_path / "source").read_bytes)
    assert caught.value.filename == str(tmp_path / "source")


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("meanwhile", [True, False])
def test_a_file_that_is_there_stays_as_it_is(tmp_path, monkeypatch, links, meanwhile):
    path = tmp_path / "file"
    if not links:
        monkeypatch.setattr("os.link", without_links)
    if not meanwhile:
        path.write_text("mine")
    with pytest.raises(FileExistsError):
        write(path, b"other", lambda: path.write_text("mine"))
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_where_there_are_no_links_a_new_file_comes_to_be_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", without_links)
    write(tmp_path / "file", b"whole")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"whole")]


def test_a_share_that_cannot_sync_folders_is_used_and_a_broken_disk_is_not(tmp_path, monkeypatch):
    for number, said in ((errno.EINVAL, None), (errno.EIO, "Input/output error")):
        monkeypatch.setattr("os.fsync", lambda _, number=number: fail(number))
        if said is None:
            sync_folder(tmp_path)
        else:
            with pytest.raises(OSError, match=said):
                sync_folder(tmp_path)


def write(path, content, meanwhile=lambda: None):
    with new_file(path, mode=0o600) as stream:
        stream.write(content)
        meanwhile()


def without_links(*names):
    fail(errno.EPERM)


def fail(number):
    raise OSError(number, os.strerror(number))
