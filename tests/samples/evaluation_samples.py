"""A node that holds units out, and what it is asked to measure."""

from __future__ import annotations

from conftest import make_batch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from node_samples import HELD
from plan_samples import plan

from conclave.model import parameters
from conclave.model.building import build
from conclave.protocol.codec import body_of, decode, encode
from conclave.protocol.messages import EvaluateReply, EvaluateRequest
from conclave.protocol.tensor_array import pack

ASIDE_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))


PLAN = plan(evaluation={"every": 4, "noise_multiplier": 2.0})


def held_out_batch(count=30):
    """Other records than those that train."""
    batch = make_batch(40 + count)
    return {name: tensor[40:] for name, tensor in batch.items()}


def model_of(asked, held=HELD, seed=1):
    network = build(asked.model, seed)
    wire = parameters.split(network.state_dict(), network.held)
    return {name: wire[name] for name in parameters.select(wire, held)}


def ask(node, asked=PLAN, round_number=4, seed=1, held=HELD, receipt=None):
    sent = {name: tensor for name, tensor in model_of(asked, held, seed).items() if name in asked.travelling(held)}
    request = EvaluateRequest(run_id="1", scenario="test", round=round_number, plan=asked, held=held, receipt=receipt)
    content = node.evaluate(request, encode(request, pack(sent)))
    return decode(content, EvaluateReply), body_of(content)
