"""CSV as programs save it: line ends, marks, spaces; and the true cause where it cannot be read."""

from __future__ import annotations

import gzip

import pytest
from format_samples import read

from conclave.base.errors import BadInputError


def write_csv(folder, content, name="a.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def reasons(data):
    return {row.where: row.why for row in data.bad}


LATIN = "größe,y\n1,0\n".encode("latin-1")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "is empty, must be an undamaged CSV file with a header"),
        (b"\n \r\n", "is empty, must be"),
        (b"a,y", "has no rows, must have one that can be used"),
        (b"a,y\r\n", "has no rows"),
        (b"a;y\n1;0\n", r"it has a;y, which looks like columns divided by ';': see delimiter"),
        (b"a\ty\n1\t0\n", "divided by '.t': see delimiter"),
        (b"a,y,y\n1,0,0\n", "has 2 columns named 'y', must have one"),
        (b"a, y ,y\n1,0,0\n", "has 2 columns named 'y', must have one"),
        (LATIN, "its header is not text in UTF-8, must be"),
        ("a,y\n1,0\n".encode("utf-16"), "is UTF-16, must be CSV in UTF-8"),
        ("a,y\n1,0\n".encode("utf-16-be"), "begins with zero bytes, as UTF-16 has them, must be CSV in UTF-8"),
        (b"PK\x03\x04[Content_Types].xml", "is a workbook, must be CSV in UTF-8"),
    ],
)
def test_a_csv_file_that_cannot_be_read_is_told_the_true_cause(content, cause, tmp_path):
    for name, stored in (("a.csv", content), ("a.csv.gz", gzip.compress(content))):
        with pytest.raises(BadInputError, match=rf"{name}: .*{cause}"):
            read(write_csv(tmp_path, stored, name), kind="csv", label="y", classes=2)


def test_cells_that_are_no_utf_8_say_so(tmp_path):
    path = write_csv(tmp_path, "a,k,y\n1,größe,0\n2,x,1\n".encode("latin-1"))
    data = read(path, kind="csv", label="y", classes=2, categories={"k": ["größe", "x"]})
    assert reasons(data) == {"row 1": "column 'k' must be text in UTF-8"}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_kind_of_line_end_is_read_with_and_without_a_mark(end, mark, tmp_path):
    lines = ["", '"a', '",k, y ', "1,u,0", "", "2, v ,1", "3,u", ""]
    path = write_csv(tmp_path, mark + end.join(lines))
    data = read(path, kind="csv", label="y", classes=2, categories={"k": ["u", " v"]}, features=["a", "k"])
    assert data.records["table"].tolist() == [[1, 1, 0], [2, 0, 1]]
    assert list(reasons(data)) == ["row 3"]


def test_names_and_values_are_found_with_the_spaces_that_they_have_in_the_file_or_without(tmp_path):
    path = write_csv(tmp_path, "age, work , income\n39, State-gov, <=50K\n50, Private,>50K\n")
    for space in ("", " "):
        document = {"label": f"{space}income", "labels": [f"{space}<=50K", f">50K{space}"]}
        work = {f"{space}work": [f"{space}State-gov", "Private"]}
        data = read(path, kind="csv", **document, categories=work, center={f"age{space}": 39})
        assert data.records["label"].tolist() == [0, 1]
        assert data.records["table"].tolist() == [[0, 1, 0], [11, 0, 1]]
