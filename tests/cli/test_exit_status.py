"""How commands end: each kind of failure has one exit status and one sentence."""

from __future__ import annotations

import errno
import os
import signal
import socket
import ssl
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
from PIL import UnidentifiedImageError

import conclave.cli.main
from conclave.base.errors import BadInputError, ConclaveError, RunFailedError, UnavailableError
from conclave.cli.exit_status import ExitStatus, status_of
from conclave.deployment.operator.flower_control import ListedRun

FINE, VIOLATION, BAD_INPUT, NOT_NOW = range(4)


def test_the_numbers_are_those_that_are_documented():
    assert [status.value for status in ExitStatus] == [FINE, VIOLATION, BAD_INPUT, NOT_NOW]


SYSTEMS = {  # what POSIX says, and whether another command line would have helped
    BAD_INPUT: ("ENOENT", "EISDIR", "ENOTDIR", "EACCES", "EPERM", "EEXIST", "ENAMETOOLONG", "ELOOP", "EADDRINUSE"),
    NOT_NOW: (
        "ENOSPC", "EDQUOT", "EROFS", "EIO", "EMFILE", "ENFILE", "ENOMEM", "EAGAIN", "EBUSY", "ESTALE", "ECONNREFUSED",
        "ECONNRESET", "ETIMEDOUT", "EHOSTUNREACH", "ENETUNREACH",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("status", "name"), [(status, name) for status, names in SYSTEMS.items() for name in names])
def test_an_error_of_the_system_counts_as_what_it_is_also_below_a_sentence(status, name):
    number = getattr(errno, name)
    error, said = OSError(number, os.strerror(number), "/a/file"), BadInputError("/a/file: cannot be written")
    said.__cause__ = error
    assert (status_of(error), status_of(said)) == (status, status)


@pytest.mark.parametrize(
    "cause",
    [None, ValueError("a"), UnidentifiedImageError("b"), OSError("c"), UnicodeError(), ssl.SSLError(1, "d")],
    ids=repr,
)
def test_what_a_file_holds_is_bad_input_whatever_a_library_raises_about_it(cause):
    said = BadInputError("x.png: cannot be read, must be a picture")
    said.__cause__ = cause
    assert status_of(said) == BAD_INPUT


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError(), socket.gaierror(2, "unknown")], ids=repr)
def test_a_connection_that_breaks_is_nobodys_input(error):
    """On some systems the resolver's numbers are those of files that are missing."""
    assert status_of(error) == NOT_NOW


def ended(monkeypatch, capsys, error: BaseException) -> tuple[object, str]:
    """End a command with an error; return the status and what is said."""
    monkeypatch.setattr(conclave.cli.main, "app", mock.Mock(side_effect=error))
    with pytest.raises(SystemExit) as caught:
        conclave.cli.main.main()
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (BadInputError("--seed is x, must be a number"), BAD_INPUT, "--seed is x, must be a number"),
        (RunFailedError("nobody came"), NOT_NOW, "the run failed: nobody came"),
        (UnavailableError("fed:1: not reachable"), NOT_NOW, "fed:1: not reachable"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), NOT_NOW, "/a: No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a\nb"), BAD_INPUT, r"/a\nb: No such file"),
    ],
)  # fmt: skip
def test_a_command_ends_with_one_sentence_and_its_status(monkeypatch, capsys, error, status, said):
    assert ended(monkeypatch, capsys, error) == (status, f"conclave: {said}\n")


@pytest.mark.parametrize("error", [ConclaveError("between parts"), ValueError("a defect"), KeyError("a defect")])
def test_a_defect_shows_its_traceback(monkeypatch, error):
    monkeypatch.setattr(conclave.cli.main, "app", mock.Mock(side_effect=error))
    with pytest.raises(type(error)):
        conclave.cli.main.main()


@pytest.mark.parametrize(
    ("sub_status", "details", "status"),
    [
        ("completed", "", FINE),
        ("failed", "scenario: model.width is 0, must be above 0", BAD_INPUT),
        ("failed", "the run failed: in round 1 every node refused (3 × paused)", NOT_NOW),
        ("failed", "the run failed; the server's log says why", NOT_NOW),
        ("failed", "No heartbeat received from the task", NOT_NOW),  # Flower's words of a server that was killed
        ("failed", "", NOT_NOW),
        ("stopped", "", NOT_NOW),
        ("stopped", "Run stopped during server upgrade.", NOT_NOW),
    ],
)
def test_a_run_on_a_server_ends_the_command_as_it_ended(monkeypatch, capsys, sub_status, details, status):
    control = mock.Mock(runs=lambda: [], start=lambda asked: 7)
    outcome = ListedRun(7, "finished", sub_status, details)
    monkeypatch.setattr("conclave.deployment.operator.profile.find_operator", lambda name: None)
    monkeypatch.setattr("conclave.deployment.operator.flower_control.Control.of", lambda operator: nullcontext(control))
    monkeypatch.setattr("conclave.deployment.operator.flower_control.follow", lambda *_: outcome)
    monkeypatch.setattr(sys, "argv", ["conclave", "train", "--resume", "heart-1", "--superlink", "fed"])
    with pytest.raises(SystemExit) as caught:
        conclave.cli.main.main()
    assert caught.value.code == status
    assert capsys.readouterr().err == ("" if status == FINE else f"conclave: run 7: {details or sub_status}\n")


def test_ctrl_c_ends_a_command_with_130(monkeypatch):
    """As click does it, and as shells expect; the enumeration's docstring says so."""
    monkeypatch.setattr(
        conclave.cli.main, "refuse_arguments_that_say_nothing", mock.Mock(side_effect=KeyboardInterrupt)
    )
    monkeypatch.setattr(sys, "argv", ["conclave", "--version"])
    with pytest.raises(SystemExit) as caught:
        conclave.cli.main.main()
    assert caught.value.code == 128 + signal.SIGINT
