"""The inline engine against Flower's Grid contract."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from conclave.simulations.engines.inline import InlineGrid, run_inline


def echo_app(seen=None) -> ClientApp:
    app = ClientApp()

    @app.query("echo")
    def echo(message: Message, context: Context) -> Message:
        record = message.content["in"]
        if seen is not None:
            seen.append((context.node_id, dict(context.node_config)))
        answer = ConfigRecord({"value": record["value"], "partition": context.node_config["partition-id"]})
        return Message(RecordDict({"out": answer}), reply_to=message)

    return app


@pytest.fixture
def grid() -> InlineGrid:
    return InlineGrid(echo_app(), 3, 99, {"scenario": "x"}, lambda reply: None)


def ask(grid, node, value) -> Message:
    return grid.create_message(RecordDict({"in": ConfigRecord({"value": value})}), "query.echo", node, "1")


def test_it_is_a_flower_grid(grid):
    assert isinstance(grid, Grid)
    assert grid.run.run_id == 99
    other = Run.create_empty(5)
    grid.set_run(other)
    assert grid.run is other


def test_every_message_reaches_its_node_and_is_answered_once(grid):
    nodes = list(grid.get_node_ids())
    assert len(nodes) == len(set(nodes)) == 3
    replies = grid.send_and_receive([ask(grid, node, node * 10) for node in reversed(nodes)], timeout=1.0)
    for node, reply in zip(reversed(nodes), replies, strict=True):
        assert reply.metadata.src_node_id == node
        assert reply.metadata.group_id == "1"
        assert reply.content["out"]["value"] == node * 10
        assert reply.content["out"]["partition"] == nodes.index(node)


def test_pushed_messages_are_pulled_by_id_and_only_once(grid):
    node = next(iter(grid.get_node_ids()))
    ids = grid.push_messages([ask(grid, node, 1), ask(grid, node, 2)])
    assert len(set(ids)) == 2
    (second,) = grid.pull_messages([ids[1]])
    assert second.content["out"]["value"] == 2
    assert second.metadata.reply_to_message_id == ids[1]
    assert grid.pull_messages([ids[1]]) == []
    assert [reply.content["out"]["value"] for reply in grid.pull_messages(ids)] == [1]


def test_a_whole_federation_runs_and_reports_progress():
    app, seen, progress = ServerApp(), [], []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        messages = [
            Message(RecordDict({"in": ConfigRecord({"value": 7})}), node, "query.echo", group_id="4")
            for node in grid.get_node_ids()
        ]
        assert len(list(grid.send_and_receive(messages))) == 4
        assert context.run_config["scenario"] == "text"

    run_inline(
        app,
        echo_app(seen),
        nodes=4,
        run_id=1,
        run_config={"scenario": "text"},
        on_reply=lambda reply: progress.append(reply.metadata.group_id),
    )
    assert [config for _, config in seen] == [{"partition-id": i, "num-partitions": 4} for i in range(4)]
    assert progress == ["4"] * 4
