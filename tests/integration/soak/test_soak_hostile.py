"""An enrolled node whose bytes are no message, or never come: the run goes on without it, and the log names it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from federation import Federation
from soaking import asked, balanced, connected, run_of, start_again

pytestmark = pytest.mark.slow

HOSTILE = """import sys
from pathlib import Path
from flwr.app import ConfigRecord
from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body
import conclave.deployment.flower.runtime as runtime
from conclave.clients.folder.node_directory import NodeDirectory
from conclave.deployment.node.process import start_node

class Evil(ConfigRecord):
    def deflate(self):
        return add_header_to_object_body(object_body=b"\\xff\\xff\\xff\\xff", obj=self)
Evil.__qualname__ = Evil.__name__ = "ConfigRecord"

honest = runtime.push_message
def push(client, message, context):
    if message.metadata.message_type == "train" and sys.argv[2] == "garbage":
        message.content["document"] = Evil({"json": "x"})
    if message.metadata.message_type == "train" and sys.argv[2] == "spoofed":
        message.metadata.__dict__["_src_node_id"] += 1
    honest(client, message, context)
runtime.push_message = push
start_node(NodeDirectory(Path(sys.argv[1])))
"""
WITHHOLDING = """from flwr.supernode import start_client_internal as loop
honest, sent = loop.push_object_contents_from_iterable, []
def push(contents, push_object_fn, **options):
    sent.append(list(contents))
    if len(sent) <= 2:  # it says what it is, and admits the plan
        honest(sent[-1], push_object_fn, **options)
loop.push_object_contents_from_iterable = push
"""


def become_hostile(federation: Federation, name: str, kind: str) -> None:
    """Start a node again, with its own key, data and ledger, but another program."""
    federation.end(name)
    program = federation.folder / "hostile.py"
    program.write_text(HOSTILE)
    (federation.folder / name / "state" / "supernode.log").unlink(missing_ok=True)
    with (federation.folder / f"{name}.log").open("ab") as log:
        federation.running[name] = subprocess.Popen(
            [sys.executable, str(program), name, kind], cwd=federation.folder, stdout=log, stderr=log,
            start_new_session=True, env=federation.environment,
        )  # fmt: skip
    federation.wait_for("the node", lambda: connected(federation, name))


@pytest.mark.parametrize("kind", ["garbage", "spoofed", "withheld"])
def test_the_run_goes_on_without_it(federation, kind):
    if kind == "withheld":
        folder = federation.folder / "withholding"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(WITHHOLDING)
        path = f"{folder}:{federation.environment.get('PYTHONPATH', '')}"
        federation.end("second")
        start_again(federation, "second", PYTHONPATH=path)
        federation.wait_for("the node", lambda: connected(federation, "second"))
    else:
        become_hostile(federation, "second", kind)
    said = federation.must(*asked(kind, 2, 15.0))
    assert "round 2 of 2: 2 of 3 replies" in said
    rounds = run_of(federation, f"{kind}-1").metrics()
    assert [(line["accepted"], line["missing"]) for line in rounds] == [(2, 1), (2, 1)]
    if kind == "garbage":  # what is announced in another's name, Flower's SuperLink does not take at all
        assert federation.log("server").count("its reply is dropped, it is no message") == 2
    federation.end("second")
    start_again(federation, "second")
    federation.wait_for("the node", lambda: connected(federation, "second"))
    assert federation.must(*asked(f"after-{kind}", 1)).count("round 1 of 1: 3 of 3 replies") == 1
    charged = balanced(federation, f"{kind}-1")
    assert charged["first"] == charged["third"] == {1: 1, 2: 1}  # what it withheld is paid for at most


def test_nothing_is_left_behind(federation):
    assert "Traceback" not in federation.log("server")
