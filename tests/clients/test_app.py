"""The ClientApp: thin, and nothing but declared fields and codes leaves it."""

from __future__ import annotations

import logging

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

from conclave.base.errors import BadInputError
from conclave.clients.app import make_client_app
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.protocol.codec import decode, encode
from conclave.protocol.messages import QUERY_DESCRIBE, TRAIN, DescribeRequest, Description, ProtocolError, TrainRequest
from conclave.server.scenario import read_scenario
from conclave.simulations import client_app
from conclave.simulations.shipped import find
from conclave.simulations.simulated_nodes import ledger_path, open_simulated


@pytest.fixture
def context(tmp_path):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 0
    scenario = read_scenario(find("digits")).to_toml()
    yield Context(
        run_id=1,
        node_id=2,
        node_config={"partition-id": 0, "num-partitions": 10},
        state=RecordDict(),
        run_config={"scenario": scenario, "run-dir": str(tmp_path)},
    )
    open_simulated.cache_clear()


def ask(context, message_type, content=None, app=client_app.app) -> RecordDict:
    message = Message(content or RecordDict(), dst_node_id=2, message_type=message_type, group_id="1")
    return app(message, context).content


def refusal(content: RecordDict) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode(content, TrainRequest)
    return caught.value.code


def test_describe(context):
    described = decode(ask(context, QUERY_DESCRIBE), Description)
    assert described.declared_size >= 10
    assert described.fingerprint


def test_describe_answers_for_a_model_and_refuses_what_is_no_request(context):
    model = read_scenario(find("digits")).model
    assert (
        decode(ask(context, QUERY_DESCRIBE, encode(DescribeRequest(model=model))), Description).expert_capacity == 4096
    )
    request = encode(DescribeRequest())
    request["document"] = ConfigRecord({"json": '{"version": 2, "model": {"width": 3}}'})
    assert refusal(ask(context, QUERY_DESCRIBE, request)) == "bad-request"


def test_simulated_nodes_declare_the_scenarios_capacities_in_turn(context, tmp_path):
    text = read_scenario(find("digits"), {"federation.capacities": [8, 4, 2]}).to_toml()
    declared = [open_simulated(text, str(tmp_path / "run"), n, 10).describe().expert_capacity for n in range(10)]
    assert declared == [8, 4, 2, 8, 4, 2, 8, 4, 2, 8]


def test_a_malformed_request_gets_a_code(context):
    assert refusal(ask(context, TRAIN)) == "bad-request"


def test_a_node_that_was_not_set_up_says_so(context):
    context.node_config = {}
    assert refusal(ask(context, QUERY_DESCRIBE)) == "not-enrolled"


def test_exception_text_stays_on_the_node(context, caplog):
    secret = "patient 4711 has a NaN in column 3"

    def fail(*args):
        raise KeyError(secret)

    with caplog.at_level(logging.ERROR, logger="conclave.node"):
        content = ask(context, QUERY_DESCRIBE, app=make_client_app(fail))
    assert refusal(content) == "internal-error"
    assert secret not in str(content)
    assert secret in caplog.text


def test_a_message_cannot_make_a_node_a_simulation(context):
    """Simulation rights come from the node's own configuration, not from what the server sends."""
    del context.node_config["partition-id"]
    context.run_config["partition-id"] = 0
    request = RecordDict()
    assert refusal(ask(context, TRAIN, request)) == "bad-request"
    assert refusal(ask(context, QUERY_DESCRIBE)) == "not-enrolled"


def test_simulated_nodes_are_distinct_seeded_and_say_so(context, tmp_path):
    scenario, run_dir = context.run_config["scenario"], context.run_config["run-dir"]
    nodes = [open_simulated(scenario, run_dir, number, 10) for number in range(10)]
    assert len({node.describe().fingerprint for node in nodes}) == 10
    assert sum(len(node.records["label"]) for node in nodes) == 1437
    genesis = LedgerFile(ledger_path(tmp_path, 3)).genesis
    assert (genesis.mode, genesis.epsilon, genesis.delta) == ("simulation", "8", "0.00001")
    assert nodes[0].new_secret("a") == nodes[0].new_secret("a") != nodes[1].new_secret("a")
    assert encode(nodes[0].describe())


def test_another_number_of_nodes_than_the_scenario_deals_to_is_refused(context):
    context.node_config["num-partitions"] = 2
    assert refusal(ask(context, QUERY_DESCRIBE)) == "schema-mismatch"


def test_what_keeps_a_node_from_answering_is_said_where_only_errors_are(context, caplog):
    """A simulation shows no more of its nodes than that, and the server is told a code."""
    for code, said in (("internal-error", ["refused with internal-error: look at its disk"]), ("paused", [])):

        def refuse(context, code=code):
            raise ProtocolError(code, "look at its disk")

        caplog.clear()
        ask(context, QUERY_DESCRIBE, encode(DescribeRequest()), app=make_client_app(refuse))
        assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == said


def test_what_only_the_owner_can_mend_is_one_line_of_the_log(context, caplog):
    def refuse(context):
        raise BadInputError("ledger.db: was signed with another key")

    content = ask(context, QUERY_DESCRIBE, encode(DescribeRequest()), app=make_client_app(refuse))
    assert refusal(content) == "internal-error"
    (record,) = caplog.records
    assert (record.getMessage().count("was signed with another key"), record.exc_info) == (1, None)
