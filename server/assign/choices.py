"""What nodes chose: asked for before some rounds, checked, kept for the rounds after, and through a restart."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from flwr.app import RecordDict
from torch import Size

from conclave.base.errors import BadInputError
from conclave.base.reading import parse_json
from conclave.base.whole_file import write_atomically
from conclave.model.experts.config import HeldExperts
from conclave.protocol.codec import body_of, decode, tensors_of
from conclave.protocol.messages import ChooseReply, Description
from conclave.protocol.plan import Plan
from conclave.server.assign.gaps import fill_gaps
from conclave.server.replies.receipts import ReceiptBook
from conclave.server.replies.validation import AskedCharge, DroppedError, accept_charge, dropping

log = logging.getLogger("conclave.server")

Choice = list[list[int]]
"""By layer, ids of experts, the most wanted first."""


class Choices:
    """The latest choices of every node; they are the output of a private mechanism and hide nothing more."""

    def __init__(self, plan: Plan, path: Path | None = None) -> None:
        """Read what was kept before.

        Args:
            path: the file; None keeps choices in memory only.

        Raises:
            BadInputError: the file is damaged.
        """
        self._plan, self._path = plan, path
        self.round = 0
        self._of: dict[str, Choice] = {}
        if path is not None and path.is_file():
            try:
                document = parse_json(path.read_bytes())
                kept = document["wishes"] if "wishes" in document else document["choices"]  # their name until 0.1
                self.round, self._of = int(document["round"]), {str(k): v for k, v in kept.items()}
                if not all(map(self._possible, self._of.values())):
                    raise ValueError("no choice of experts")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BadInputError(f"{path}: damaged, must hold what nodes chose") from error

    def _possible(self, choice: Choice) -> bool:
        layers, experts = self._plan.model.layers, set(range(self._plan.model.experts.routed))
        return len(choice) == layers and all(len(set(ids)) == len(ids) and experts.issuperset(ids) for ids in choice)

    def due(self, round_number: int) -> bool:
        """Whether nodes are to be asked before this round, and were not yet."""
        return self._plan.affinity is not None and self._plan.affinity.due(round_number) and self.round < round_number

    def take(
        self, round_number: int, node: Description, run_id: str, sent: str, content: RecordDict, receipts: ReceiptBook
    ) -> None:
        """Take a node's answer.

        Args:
            sent: SHA-256 of the tensors that went with the question: the charge must be for them.

        Raises:
            DroppedError: what it sent is no choice of experts, or was not paid for; what it chose before stands.
            ProtocolError: it refused.
        """
        plan = self._plan
        if plan.affinity is None:
            raise ValueError("the plan has no choices")
        count = min(plan.affinity.experts, node.expert_capacity)
        charge = AskedCharge(
            kind="choose",
            node=node.fingerprint,
            ledger=node,
            run_id=run_id,
            round=round_number,
            plan_hash=plan.hash,
            model_in_hash=sent,
        )
        with dropping():
            accept_charge(charge, decode(content, ChooseReply), body_of(content), receipts)
            chosen = tensors_of(content, {f"choice/{layer}": Size([count]) for layer in range(plan.model.layers)})
        choice = [chosen[f"choice/{layer}"] for layer in range(plan.model.layers)]
        for ids in choice:
            whole = bool((ids == ids.round()).all()) and bool(((ids >= 0) & (ids < plan.model.experts.routed)).all())
            if not whole or len(torch.unique(ids)) != len(ids):
                raise DroppedError("document", "its choice is not of different experts")
        self._of[node.fingerprint] = [[int(expert) for expert in ids] for ids in choice]

    def finish(self, round_number: int) -> None:
        """Keep what was taken, durably."""
        self.round = round_number
        if self._path is not None:
            document = {"round": self.round, "choices": self._of}
            write_atomically(self._path, json.dumps(document, sort_keys=True).encode())

    def assign(self, before: Mapping[str, HeldExperts], min_holders: int) -> dict[str, HeldExperts]:
        """Return node → layer → experts: as nodes chose, mended so that every expert has holders.

        Args:
            before: what those nodes get that never chose; it counts as their choice.
        """
        experts = self._plan.model.experts.routed
        assigned: dict[str, HeldExperts] = {node: {} for node in before}
        for layer in range(self._plan.model.layers):
            choices = {
                node: self._of[node][layer] if node in self._of else list(held[layer]) for node, held in before.items()
            }
            for node, ids in fill_gaps(choices, experts, min_holders).items():
                assigned[node][layer] = ids
        return assigned
