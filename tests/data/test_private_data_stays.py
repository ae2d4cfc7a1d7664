"""Rule 14 of docs/privacy.md: reading private data connects to nothing, writes nothing, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from format_samples import SAMPLES, parse
from pyarrow import csv, parquet

from conclave.data.private_data import read_private

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import json, os, resource, sys
from pathlib import Path

sys.path[:0] = [{root!r}, {tests!r}]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.rmdir",
            "shutil.", "tempfile.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen",
            "sqlite3.", "ftplib.", "urllib.", "http.", "socket.", "pickle.")
ALLOWED = "socket.__new__"  # a socket that is made and never used; what it does has events of its own
found = []

def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if (flags or 0) & WRITING or (isinstance(mode, str) and set(mode) & set("wax+")):
            found.append(f"open {{path!r}} for writing")
    elif event.startswith(CHANGING) and event != ALLOWED:
        found.append(f"{{event}} {{arguments!r}}"[:200])

from pydantic import TypeAdapter
from conclave.data.formats.config import FormatConfig
from conclave.data.private_data import read_private

if {limited!r}:  # from here on no byte can be written to a file, not by libraries in C either
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a process that tries to is ended: its memory is nobody's need
sys.addaudithook(hook)

for path, document, unit in json.loads(Path({jobs!r}).read_bytes()):
    data = read_private(Path(path), TypeAdapter(FormatConfig).validate_json(json.dumps(document)), unit)
    assert len(next(iter(data.records.values()))) > 0
{sabotage}
for number in os.listdir("/proc/self/fd"):
    try:
        link = os.readlink(f"/proc/self/fd/{{number}}")
    except FileNotFoundError:  # the listing's own
        continue
    if link.startswith("socket:"):
        found.append(link)
loaded = [name for name in ("datasets", "huggingface_hub", "requests", "httpx", "aiohttp") if name in sys.modules]
print(json.dumps([found, loaded]))
"""


def everything_under(*folders: Path) -> set[tuple[str, int, int]]:
    return {(str(p), p.lstat().st_mtime_ns, p.lstat().st_size) for folder in folders for p in folder.rglob("*")}


def run(tmp_path: Path, names: list[str], sabotage: str = "", *, limited: bool = True) -> tuple[list, list, list]:
    """Read data sets in a process of its own; return what it did, loaded and left behind."""
    jobs, source = [], tmp_path / "source"
    for number, name in enumerate(names):
        (source / str(number)).mkdir(parents=True)
        path, document = SAMPLES[name](source / str(number))
        jobs.append([str(path), document, "record" if name.startswith("idx") else "group"])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    own = {name: tmp_path / name for name in ("home", "temporary", "cache", "here")}
    for folder in own.values():
        folder.mkdir(parents=True)
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_", "HUGGINGFACE"))
    }
    environment |= {"HOME": str(own["home"]), "TMPDIR": str(own["temporary"]), "XDG_CACHE_HOME": str(own["cache"])}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    code = CHILD.format(
        root=str(ROOT / "src"),
        tests=str(ROOT / "tests" / "samples"),
        jobs=str(tmp_path / "jobs.json"),
        sabotage=sabotage,
        limited=limited,
    )
    before = everything_under(source, *own.values())
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=own["here"], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    found, loaded = json.loads(process.stdout.splitlines()[-1])
    return found, loaded, sorted(everything_under(source, *own.values()) ^ before)


def test_reading_every_format_calls_nobody_and_writes_nothing(tmp_path):
    found, loaded, left = run(tmp_path, list(SAMPLES))
    assert found == []
    assert left == []
    assert loaded == []  # not even a library that could


SABOTAGE = {
    "import socket; socket.getaddrinfo('localhost', 80)": "socket.getaddrinfo",
    "import socket; s = socket.socket(); s.connect_ex(('127.0.0.1', 9)); s.close()": "socket.connect",
    "import socket; kept = socket.socket()": "socket:",
    "open('copy', 'w').close()": "open 'copy' for writing",
    "os.close(os.open('other', os.O_CREAT | os.O_RDWR))": "open 'other' for writing",
    "import tempfile; tempfile.TemporaryFile()": "/temporary",
    "os.mkdir('cache')": "os.mkdir",
    "import pickle; pickle.loads(pickle.dumps(os.getcwd))": "pickle.find_class",
    "import subprocess; subprocess.run(['true'])": "subprocess.Popen",
}
"""What a reader might do → how the test sees it."""


def test_the_test_would_see_it(tmp_path):
    """All in one process: to start it takes longer than all that it does."""
    found, _, _ = run(tmp_path, ["csv"], "\n".join(SABOTAGE))
    unseen = [code for code, expected in SABOTAGE.items() if not any(expected in entry for entry in found)]
    assert unseen == [], found


def test_the_test_would_see_what_a_library_in_c_leaves_behind(tmp_path):
    """Python's audit does not see pyarrow's own files; the folders and the limit on their size do."""
    sabotage = "import pyarrow as pa; f = pa.OSFile('copy', 'wb'); {}f.close()"
    found, _, left = run(tmp_path, ["parquet"], sabotage.format("f.write(b'x'); "), limited=False)
    assert found == []
    assert any("here/copy" in entry[0] for entry in left)
    with pytest.raises(AssertionError):
        run(tmp_path / "again", ["parquet"], sabotage.format("f.write(b'x'); "))


def test_pyarrow_holds_nothing_of_pythons_once_a_data_set_is_read(tmp_path, monkeypatch):
    """Its threads would let go of it whenever they come to it, and abort a process that ends in the meantime."""
    given, read = [], []

    def watched(module, name):
        original = getattr(module, name)

        def opened(source, *args, **options):
            given.append(source)
            options_of_its_own = options.get("options") or options.get("read_options")
            read.append(options.get("pre_buffer", False) or getattr(options_of_its_own, "use_threads", False))
            return original(source, *args, **options)

        monkeypatch.setattr(module, name, opened)

    watched(csv, "read_csv")
    watched(csv, "open_csv")
    watched(parquet, "ParquetFile")
    watched(pa.ipc, "open_stream")
    for name in ("csv", "csv, gz", "parquet", "hugging-face"):
        (tmp_path / name).mkdir()
        path, document = SAMPLES[name](tmp_path / name)
        read_private(path, parse(document), "group")
    assert len(given) >= 8
    assert all(isinstance(source, pa.NativeFile) and not isinstance(source, pa.PythonFile) for source in given)
    assert all(source.closed for source in given)
    assert not any(read), "nothing may be read ahead or by threads"
