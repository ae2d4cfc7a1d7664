"""A node as it runs: its data in memory, its ledgers open, its policy and its owner's approvals."""

from __future__ import annotations

import logging

from conclave.base.errors import BadInputError, UnavailableError
from conclave.clients.approvals import Approvals
from conclave.clients.folder.node_directory import NodeDirectory
from conclave.clients.node import Node
from conclave.clients.node_ledger import HeldOut
from conclave.data.formats.config import FormatConfig
from conclave.data.held_out import sides_of
from conclave.data.private_data import PrivateData, read_private
from conclave.deployment.host.fixed_layout import keep_layout
from conclave.deployment.node.limits import bytes_in_use, check_room
from conclave.privacy.accounting.sensible_budget import doubts
from conclave.privacy.ledger.upkeep.data_place import look_at
from conclave.privacy.randomness import fresh_secret

log = logging.getLogger("conclave.node")


def read_data(directory: NodeDirectory) -> PrivateData:
    """Read a node's private data as its ``node.toml`` says; nothing is copied, and bad rows are left out.

    Raises:
        BadInputError: they cannot be read, or no format is stated.
    """
    config = directory.config
    return read_private(directory.data, _format(directory), config.dataset.unit)


def open_node(directory: NodeDirectory) -> Node:
    """Open a node for work.

    Raises:
        BadInputError: the data cannot be read, are stored otherwise than in the first run, leave no memory for
            training, or a ledger may not be opened; see
            :meth:`conclave.clients.folder.node_directory.NodeDirectory.open_ledger`.
        UnavailableError: the data are exchanged meanwhile.
    """
    config, before = directory.config, look_at(directory.data)
    data = read_data(directory)
    check_room(bytes_in_use())
    ledger, held_out = directory.open_ledger(), None
    if not look_at(directory.data).is_still(before):  # the claims are on what lies there now
        raise UnavailableError(f"{directory.data}: other files lay there while it was read; start again")
    records, size = data.records, config.dataset.declared_size
    for doubt in doubts(config.budget.epsilon, config.budget.delta, size):  # of ledgers made before it was refused too
        log.warning("%s", doubt)
    if directory.held_out is not None:
        records, aside = sides_of(records, ledger.genesis, map(bytes, data.identity_N))
        held_out = HeldOut(aside, directory.open_ledger("held-out"))
        keep_layout(directory.layout, data.stored_as, ledger.head.seq + held_out.ledger.head.seq)
        size = max(1, round(size * (1.0 - config.dataset.held_out)))  # both numbers are public
    return Node(
        records=records,
        schema=data.schema,
        declared_size=size,
        policy=config.policy,
        ledger=ledger,
        new_secret=lambda _: fresh_secret(),
        held_out=held_out,
        approvals=Approvals(directory.plans, hours=config.limits.hours),
    )


def _format(directory: NodeDirectory) -> FormatConfig:
    if directory.config.format is None:
        raise BadInputError(f"{directory.path / 'node.toml'}: no [format], must say how the data are laid out")
    return directory.config.format
