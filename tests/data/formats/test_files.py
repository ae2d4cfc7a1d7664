"""Which files of a folder are a data set's, and in which order."""

from __future__ import annotations

import pytest

from conclave.base.errors import BadInputError
from conclave.data.formats.files import files_in, folder_at


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_files_of_all_folders_in_the_order_of_their_names(tmp_path):
    make(
        tmp_path, "b/1.csv", "a/2.CSV", "a/10.csv", "a.csv", "a/notes.txt", ".git/x.csv", "a/.hidden.csv", "c.csv/d.csv"
    )
    found = [file.relative_to(tmp_path).as_posix() for file in files_in(tmp_path, (".csv",))]
    assert found == ["a/10.csv", "a/2.CSV", "a.csv", "b/1.csv", "c.csv/d.csv"]


def test_a_file_is_itself_whatever_it_is_called(tmp_path):
    make(tmp_path, "rows")
    assert files_in(tmp_path / "rows", (".csv",)) == [tmp_path / "rows"]


def test_nothing_to_read_is_said(tmp_path):
    make(tmp_path, "rows.txt")
    with pytest.raises(BadInputError, match=r"must be a file or a folder with files that end in \.csv or \.tsv"):
        files_in(tmp_path, (".csv", ".tsv"))
    with pytest.raises(BadInputError, match="must be a folder"):
        folder_at(tmp_path / "rows.txt")
