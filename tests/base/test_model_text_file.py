"""Text that people hand over, however their editor, their mail program or their system saved it."""

from __future__ import annotations

import pytest

from conclave.base.errors import BadInputError
from conclave.base.reading import MOST_BYTES, read_text
from conclave.base.toml_file import read_toml

BOM = b"\xef\xbb\xbf"
TEXT = 'name = "wärd 7"\nrounds = 3\n'


def read(tmp_path, content: bytes) -> str:
    path = tmp_path / "file.toml"
    path.write_bytes(content)
    return read_text(path, "a plan")


def test_marks_and_line_ends_are_no_part_of_a_text(tmp_path):
    plain = TEXT.encode()
    other = plain.replace(b"\n", b"\r\n")
    for content in (plain, BOM + plain, other, BOM + other, plain.replace(b"\n", b"\r")):
        assert read(tmp_path, content) == TEXT
        assert read_toml(tmp_path / "file.toml", "a plan") == {"name": "wärd 7", "rounds": 3}
    assert read(tmp_path, plain.rstrip(b"\n")) == TEXT.rstrip("\n")
    assert read(tmp_path, b"") == ""


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "latin-1"])
def test_another_encoding_is_named(tmp_path, encoding):
    content = TEXT.encode(encoding)
    named = "line 1 is no text in UTF-8" if encoding == "latin-1" else f"it is text in {encoding[:6].upper()}"
    if encoding == "utf-32-be":
        content = b"\0\0\xfe\xff" + content
    with pytest.raises(BadInputError) as caught:
        read(tmp_path, content)
    where = tmp_path / "file.toml"
    assert str(caught.value) == f"{where}: cannot be read, must be a plan: {named}, must be saved as UTF-8"


def test_the_line_that_is_no_text_is_named(tmp_path):
    with pytest.raises(BadInputError, match="line 3 is no text in UTF-8"):
        read(tmp_path, b"a = 1\r\nb = 2\r\nc = '\xe9'\r\n")


def test_what_is_no_file_of_bounded_length_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="must be a plan: No such file"):
        read_text(tmp_path / "none", "a plan")
    with pytest.raises(BadInputError, match="must be a plan: Is a directory"):
        read_text(tmp_path, "a plan")
    with (tmp_path / "sparse").open("wb") as stream:
        stream.truncate(MOST_BYTES + 1)
    with pytest.raises(BadInputError, match="it has more than"):
        read_text(tmp_path / "sparse", "a plan")
