"""A second start of the same folder, or a port in use, ends with one sentence before anything is started."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from conclave.base.errors import BadInputError, UnavailableError
from conclave.clients.folder.node_key import check_node_key, create_node_key
from conclave.deployment.host.alone import alone, check_ports

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_is_held_by_one_process_and_free_after_it(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); from pathlib import Path\n"
        "from conclave.deployment.host.alone import alone\n"
        f"with alone(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UnavailableError, match="is running already"), alone(tmp_path):
        pass
    other.communicate("")
    with alone(tmp_path):
        assert (tmp_path / "running.lock").stat().st_mode & 0o077 == 0


def test_a_port_in_use_is_named(monkeypatch):
    monkeypatch.setattr("conclave.deployment.host.alone.PATIENCE_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"monitoring.metrics_port": ("127.0.0.1", None), "server.internal_port": ("127.0.0.1", port)}
        with pytest.raises(BadInputError, match=rf"server\.internal_port {port}: cannot be used"):
            check_ports(ports)
    check_ports(ports)


def test_a_port_that_a_killed_process_is_leaving_is_waited_for():
    taken = socket.create_server(("127.0.0.1", 0))
    leaving = threading.Timer(0.3, taken.close)
    leaving.start()
    check_ports({"server.internal_port": ("127.0.0.1", taken.getsockname()[1])})
    assert taken.fileno() == -1
    leaving.join()


@pytest.mark.parametrize("flaw", ["missing", "garbage", "another", "readable", "ed25519"])
def test_a_key_that_a_node_cannot_use_is_named(tmp_path, flaw):
    path = tmp_path / "node.key"
    create_node_key(path)
    check_node_key(path)
    (tmp_path / "node.key.pub").rename(tmp_path / "kept")
    check_node_key(path)  # the public half may be gone
    (tmp_path / "kept").rename(tmp_path / "node.key.pub")
    said = "missing or no key"
    if flaw == "missing":
        path.unlink()
    elif flaw == "garbage":
        path.write_text("garbage")
    elif flaw == "another":
        create_node_key(tmp_path / "other.key")
        (tmp_path / "other.key").rename(path)
        said = "is not the private half"
    elif flaw == "readable":
        path.chmod(0o640)
        said = "chmod 600"
    else:
        path.unlink()
        (tmp_path / "node.key.pub").unlink()
        formats = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
        path.write_bytes(Ed25519PrivateKey.generate().private_bytes(*formats))
        said = "another kind of key"
    with pytest.raises(BadInputError, match=said):
        check_node_key(path)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"", b" owner@ward-7\r\n\r\n"])
def test_a_public_key_is_the_same_however_it_was_saved(tmp_path, end):
    public = create_node_key(tmp_path / "node.key")
    public.write_bytes(b"\xef\xbb\xbf" + public.read_bytes().strip() + end)
    check_node_key(tmp_path / "node.key")


@pytest.mark.parametrize("unread", ["node.key", "node.key.pub"])
def test_a_key_that_this_user_cannot_read_is_not_to_be_replaced(tmp_path, monkeypatch, unread):
    path, read = create_node_key(tmp_path / "node.key").with_suffix(""), Path.read_bytes

    def refuse(asked):
        if asked.name == unread:
            raise PermissionError(errno.EACCES, "Permission denied", str(asked))
        return read(asked)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(BadInputError, match=f"{unread}: cannot be read") as refused:
        check_node_key(path)
    assert "ssh-keygen" not in str(refused.value)


def test_a_node_key_whose_making_was_interrupted_is_made_anew(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            create_node_key(tmp_path / "node.key")
    create_node_key(tmp_path / "node.key")
    check_node_key(tmp_path / "node.key")
