"""Who takes part: nodes that described themselves and set their budget aside, under whatever Flower id.

A node is known by its ledger key. Its Flower id is only where to reach it: it may change when a node returns, and
whoever claims another's key is found out when a reply comes without its signature.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from conclave.base.errors import RunFailedError
from conclave.protocol.codec import decode, encode
from conclave.protocol.messages import (
    QUERY_ADMIT,
    QUERY_CLOSE,
    QUERY_DESCRIBE,
    Admission,
    AdmitRequest,
    Closed,
    CloseRequest,
    DescribeRequest,
    Description,
    ProtocolError,
)
from conclave.protocol.plan import Plan
from conclave.server.scenario import Scenario

log = logging.getLogger("conclave.server")

_NODES_APPEAR_WITHIN_S = 5.0
_OWNER_DECIDES = ("awaiting-approval", "paused")
"""Refusals of a plan that its owner may take back at any time: the node is asked again before each round."""
_NEWCOMERS_ANSWER_WITHIN_S = 10.0
"""How long a round waits for nodes that have just appeared. Who takes longer joins a later round."""


class Roster:
    """The nodes of a run. Describe and admit them before round one, and look for changes between rounds."""

    def __init__(self, grid: Grid, scenario: Scenario, plan: Plan, run_id: str) -> None:
        self._grid = grid
        self._scenario = scenario
        self._plan = plan
        self._run_id = run_id
        self._connected: set[int] = set()
        self._claims: dict[str, dict[int, Description]] = {}  # fingerprint → Flower id → description, as they came
        self._admitted: set[str] = set()
        # Flower ids that were asked, by question. Who leaves and comes back may have been repaired: it is asked again.
        self._asked: dict[str, set[int]] = {QUERY_DESCRIBE: set(), QUERY_ADMIT: set()}
        self._pending: dict[str, tuple[int, str]] = {}  # message id → the node that it went to, and the question
        self._settled = False
        self._undecided: set[int] = set()
        self.refused: Counter[str] = Counter()
        """Code → how many nodes answered with it before the first round, and do not take part."""

    def describe(self) -> dict[int, Description]:
        """Ask every node what is public about it; return those that can take part, by Flower node id.

        Raises:
            RunFailedError: none can.
        """
        self._connected = set(_connected(self._grid, self._scenario.nodes))
        refused = self._ask(QUERY_DESCRIBE, self._connected)
        self.refused = refused.copy()
        found = self._reachable()
        if not found:
            why = counted(refused) or "none answered"
            hint = ""
            if refused["schema-mismatch"]:
                hint = f"; a simulation of this scenario needs {self._scenario.nodes} nodes"
            raise RunFailedError(f"no node can take part ({why}), must be at least one{hint}")
        return found

    def admit(self) -> dict[int, Description]:
        """Ask the described nodes to set the budget for the whole plan aside; return those that did.

        Raises:
            RunFailedError: none did.
        """
        refused = self._ask(QUERY_ADMIT, self._reachable())
        self.refused += refused
        if not self._admitted:
            why = counted(refused) or "none answered"
            then = "; start the run again once owners have approved it" if refused["awaiting-approval"] else ""
            raise RunFailedError(f"no node admits the plan ({why}), must be at least one; nodes' logs say why{then}")
        return self.members()

    def refresh(self) -> bool:
        """Look who came, left or returned; describe and admit newcomers; say whether anything may have changed.

        Nothing that a node does here ends the run. If nothing changed, it costs one look at the connected ids.
        Newcomers get a moment to answer, once; later answers are taken at a later look, and so are those of nodes whose
        owner had not decided yet.
        """
        connected = set(self._grid.get_node_ids())
        if self._settled and connected == self._connected and not self._undecided:
            return False
        for asked in self._asked.values():
            asked &= connected
        self._pending = {key: entry for key, entry in self._pending.items() if entry[0] in connected}
        self._connected = connected
        self._undecided &= connected
        deadline, pushed = time.monotonic() + _NEWCOMERS_ANSWER_WITHIN_S, False
        while True:
            pushed |= self._push_questions()
            if self._take_answers():
                continue  # a description may lead to the question of admission
            if not (self._pending and pushed) or time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        self._push(QUERY_ADMIT, sorted(self._undecided - {node for node, _ in self._pending.values()}))
        self._settled = not self._pending
        return True

    def members(self) -> dict[int, Description]:
        """Return the connected nodes that admitted the plan, by Flower node id."""
        return {node: found for node, found in self._reachable().items() if found.fingerprint in self._admitted}

    def close(self) -> None:
        """Tell the nodes that the run is over, so that they give back what it did not use."""
        nodes = self._reachable()
        for reply in self._replies(QUERY_CLOSE, nodes):
            try:
                if not reply.has_content():
                    raise ProtocolError("internal-error")
                decode(reply.content, Closed)
            except ProtocolError as error:
                log.warning("node %d did not close the run: %s", reply.metadata.src_node_id, error.code)

    def _reachable(self) -> dict[int, Description]:
        """Return the described nodes that are connected. Of several ids with one key, the first that came has it.

        A later one may be the same node, restarted while Flower still lists its old id. Or it is an impostor, who can
        do no more than send what is not signed.
        """
        found = {}
        for claims in self._claims.values():
            node = next((node for node in claims if node in self._connected), None)
            if node is not None:
                found[node] = claims[node]
        return dict(sorted(found.items()))

    def _due(self) -> dict[str, list[int]]:
        """Return question → connected nodes that have not been asked it."""
        describe = self._connected - self._asked[QUERY_DESCRIBE]
        reachable = self._reachable()
        admit = [node for node, found in reachable.items() if found.fingerprint not in self._admitted]
        return {
            QUERY_DESCRIBE: sorted(describe),
            QUERY_ADMIT: [node for node in admit if node not in self._asked[QUERY_ADMIT] | describe],
        }

    def _push_questions(self) -> bool:
        due = self._due()
        for question, nodes in due.items():
            self._push(question, nodes)
        return any(due.values())

    def _push(self, question: str, nodes: list[int]) -> None:
        messages = [self._message(question, node) for node in nodes]
        if messages:
            self._pending |= zip(self._grid.push_messages(messages), ((n, question) for n in nodes), strict=True)
        self._asked[question].update(nodes)

    def _take_answers(self) -> bool:
        replies = list(self._grid.pull_messages(list(self._pending))) if self._pending else []
        for reply in replies:
            node, question = self._pending.pop(reply.metadata.reply_to_message_id, (None, ""))
            if node is not None and node == reply.metadata.src_node_id:
                self._take(question, reply, Counter())
        return bool(replies)

    def _ask(self, question: str, nodes: Iterable[int]) -> Counter[str]:
        """Put a question to nodes and wait for the answers; return why it was refused, and how often."""
        refused: Counter[str] = Counter()
        for reply in self._replies(question, nodes):
            self._asked[question].add(reply.metadata.src_node_id)  # who was silent is asked again later
            self._take(question, reply, refused)
        return refused

    def _replies(self, question: str, nodes: Iterable[int]) -> Iterator[Message]:
        """Yield the nodes' answers in the order of their ids."""
        asked = set(nodes)
        requests = [self._message(question, node) for node in sorted(asked)]
        replies = self._grid.send_and_receive(requests, timeout=self._scenario.federation.reply_timeout_s)
        for reply in sorted(replies, key=lambda message: message.metadata.src_node_id):
            if reply.metadata.src_node_id in asked:
                yield reply

    def _message(self, question: str, node: int) -> Message:
        content = encode(DescribeRequest(model=self._scenario.model))
        if question == QUERY_ADMIT:
            content = encode(AdmitRequest(run_id=self._run_id, scenario=self._scenario.name, plan=self._plan))
        elif question == QUERY_CLOSE:
            content = encode(CloseRequest(run_id=self._run_id))
        return Message(content, dst_node_id=node, message_type=question)

    def _take(self, question: str, reply: Message, refused: Counter[str]) -> None:
        """Take the answer to a question."""
        node = reply.metadata.src_node_id
        try:
            if not reply.has_content():
                raise ProtocolError("internal-error")
            if question == QUERY_DESCRIBE:
                self._take_description(node, reply.content)
            else:
                self._take_admission(node, reply.content)
        except ProtocolError as error:
            doing = "cannot take part" if question == QUERY_DESCRIBE else "does not admit the plan"
            log.warning("node %d %s: %s", node, doing, error.code)
            refused[error.code] += 1
            if error.code in _OWNER_DECIDES and question == QUERY_ADMIT:
                self._undecided.add(node)
                return
        self._undecided.discard(node)

    def _take_description(self, node: int, content: RecordDict) -> None:
        """Note what a node is. Under its id there may be another node now, or one that can no longer take part."""
        before = next((claims for claims in self._claims.values() if node in claims), {})
        try:
            description = decode(content, Description)
        except ProtocolError:
            before.pop(node, None)
            raise
        fits = description.expert_capacity >= self._scenario.model.experts.top_k
        if not fits or self._claims.get(description.fingerprint) is not before:
            before.pop(node, None)
        if not fits:
            log.warning("node %s can hold fewer experts than a token needs; left out", description.fingerprint)
            return
        claims = self._claims.setdefault(description.fingerprint, {})
        if claims.keys() - {node}:
            log.warning("node %d uses the key of another node, which goes first while it is connected", node)
        claims[node] = description

    def _take_admission(self, node: int, content: RecordDict) -> None:
        if decode(content, Admission).plan_hash != self._plan.hash:
            raise ProtocolError("bad-request", "another plan than was asked for")
        self._admitted |= {found.fingerprint for at, found in self._reachable().items() if at == node}


def counted(refused: Counter[str]) -> str:
    """Say how often each code was the answer, e.g. ``2 × paused, 1 × not-allowed``."""
    return ", ".join(f"{count} × {code}" for code, count in sorted(refused.items()))


def _connected(grid: Grid, expected: int) -> list[int]:
    """Return the connected nodes, after giving ``expected`` of them a moment to appear.

    Flower's simulation runtime starts the ServerApp before its nodes are registered.
    """
    deadline = time.monotonic() + _NODES_APPEAR_WITHIN_S
    while len(nodes := list(grid.get_node_ids())) < expected and time.monotonic() < deadline:
        time.sleep(0.1)
    return nodes
