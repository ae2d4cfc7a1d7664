"""A node's folder: its configuration, its ledgers and their keys, and what the owner does with them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from conclave.base.canonical import decimal
from conclave.base.errors import BadInputError
from conclave.base.whole_file import write_atomically
from conclave.clients.folder.data_claims import DataClaims
from conclave.clients.folder.folder_owner import check_owner
from conclave.clients.folder.ledger_files import LedgerFiles
from conclave.clients.folder.node_config import (
    BudgetConfig,
    ConnectionConfig,
    DatasetConfig,
    NodeConfig,
    StorageConfig,
    default_text,
    parse_node_config,
    read_node_config,
)
from conclave.clients.folder.node_key import create_node_key
from conclave.privacy.accounting.filter import fixed_order
from conclave.privacy.accounting.sensible_budget import check_delta
from conclave.privacy.ledger import Genesis, Ledger
from conclave.privacy.ledger.genesis import Side
from conclave.privacy.ledger.machine import machine_id
from conclave.privacy.ledger.upkeep.recovery import Recovery
from conclave.privacy.ledger.upkeep.registry import Owner, claim, default_registry, withdraw

_CLAIMS = "data.claims"


class NodeDirectory:
    """The folder that holds a ``node.toml``.

    training: the ledger of the units that train. held_out: that of the other units; None if all units train.
    """

    def __init__(self, path: Path) -> None:
        """Read the configuration.

        Raises:
            BadInputError: there is none, it cannot be used, or the node is another user's.
        """
        self.path = path
        self.config: NodeConfig = read_node_config(path / "node.toml")
        self.training, held_out = _files(path, self.config.storage)
        self.held_out = held_out if self.config.dataset.held_out else None
        check_owner(self.state if self.state.exists() else path)

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        dataset: DatasetConfig,
        budget: BudgetConfig,
        storage: StorageConfig,
        registry: Path,
        server: ConnectionConfig | None = None,
    ) -> NodeDirectory:
        """Create keys, ledgers and witnesses, and write ``node.toml``.

        That file comes last: calling this again in the same way completes what an interrupted attempt began.

        Args:
            registry: where datasets that have a ledger are recorded.
            server: the one to dial; may be added to ``node.toml`` later.

        Raises:
            BadInputError: the folder is a node's or another user's already, the dataset has a ledger, also one that was
                lost, or the budget allows nothing, or everything.
        """
        config_path = path / "node.toml"
        if config_path.exists():
            raise BadInputError(f"{config_path}: exists already, must be a new node")
        training, held_out = _files(path, storage)
        state = training.path.parent
        if state.exists():
            check_owner(state)
        machine = machine_id(storage.machine)
        fixed_order(budget.epsilon, budget.delta)  # refuses a budget that allows nothing, before anything is claimed
        check_delta(budget.delta, dataset.declared_size, where="budget.delta")
        files = [training, held_out] if dataset.held_out else [training]
        data, exist = path / dataset.data, all(one.path.exists() for one in files)
        claims = claim(registry, dataset.id, data, training.path, exists=exist)
        try:
            try:
                state.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise BadInputError(f"{state}: cannot be created ({error.strerror})") from error
            _begin_ledgers(training, held_out, dataset, budget, machine)
        except BaseException:
            if not training.path.exists() and not held_out.path.exists():
                withdraw(claims)
            raise
        remembered = DataClaims(state / _CLAIMS)
        remembered.remember(registry, [data.resolve()])
        remembered.check(dataset.id, data, _owner(files))  # from now on the ledger counts as used
        if not (state / "node.key").exists():
            create_node_key(state / "node.key")
        write_atomically(config_path, default_text(dataset, budget, storage, server).encode())
        return cls(path)

    def files(self, side: Side) -> LedgerFiles:
        """Return the ledger of one side, checked against the configuration.

        Raises:
            BadInputError: the node holds no units out, or the configuration states another budget, dataset, unit or
                share than the ledger was created with.
        """
        files = self.training if side == "training" else self.held_out
        if files is None:
            raise BadInputError(f"{self.path / 'node.toml'}: dataset.held_out is 0, so there is no such ledger")
        self._check_constants(files.genesis)
        return files

    def open_ledger(self, side: Side = "training") -> Ledger:
        """Open a ledger for work.

        Raises:
            BadInputError: as :meth:`files`; or it was restored or copied, its witness is missing or ahead, the machine
                or the key is another, or the data are another ledger's or lie where they never did.
        """
        files = self.files(side)
        self._check_claims()
        return files.open(self._machine)

    def claim_data(self) -> None:
        """Claim the place that ``dataset.data`` names now, in addition to those that were claimed before.

        Raises:
            BadInputError: as :meth:`open_ledger`.
        """
        for side in self.sides:
            self.files(side).open(self._machine).close()  # whoever claims must be able to pay
        self._check_claims(moved=True)

    def rotate_key(self, side: Side = "training") -> str:
        """Replace a ledger's signing key by a new one; return its public half. A crash leaves one of the two in use.

        Raises:
            BadInputError: see :meth:`open_ledger`.
        """
        return self.files(side).rotate_key(self._machine)

    def restore(self, evidence: Path | None = None, side: Side = "training") -> Recovery:
        """Start again from a restored or moved ledger; see :mod:`conclave.privacy.ledger.upkeep.recovery`.

        Raises:
            BadInputError: it is not this node's ledger, the evidence does not hold, or the data are another ledger's.
        """
        files = self.files(side)
        recovery = files.restore(self._machine, evidence)
        self._check_claims(moved=True)
        return recovery

    def close_plans(self, run_id: str) -> int:
        """Give back what is set aside for a run on either side; return how many plans were open.

        Raises:
            BadInputError: see :meth:`open_ledger`.
        """
        closed = 0
        for side in self.sides:
            ledger = self.open_ledger(side)
            try:
                closed += ledger.close_plans(run_id)
            finally:
                ledger.close()
        return closed

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides that have a ledger."""
        return ("training",) if self.held_out is None else ("training", "held-out")

    @property
    def state(self) -> Path:
        """The folder of what the node keeps: ledgers, keys, plans, Flower's files."""
        return self.training.path.parent

    @property
    def node_key(self) -> Path:
        """What the node proves itself with to the server; ``.pub`` beside it is the public half."""
        server = self.config.server
        return self.state / "node.key" if server is None else self.path / server.key

    @property
    def plans(self) -> Path:
        """The folder of plans that wait for the owner or were approved."""
        return self.state / "plans"

    @property
    def layout(self) -> Path:
        """What the records' sides depend on besides the records, if units are held out."""
        return self.state / "held-out.layout"

    def connection_files(self) -> tuple[Path, Path]:
        """Return the node's key for the server, and the certificates that may have signed the server's.

        Raises:
            BadInputError: the node is not connected to a server.
        """
        server = self.config.server
        if server is None:
            raise BadInputError(f"{self.path / 'node.toml'}: no [server], must say which server to dial")
        return self.node_key, self.path / server.ca

    @property
    def data(self) -> Path:
        """Where the data lie."""
        return self.path / self.config.dataset.data

    @property
    def _ledgers(self) -> list[LedgerFiles]:
        return [self.training] if self.held_out is None else [self.training, self.held_out]

    def _check_claims(self, *, moved: bool = False) -> None:
        owner = _owner(self._ledgers)
        DataClaims(self.state / _CLAIMS).check(self.config.dataset.id, self.data, owner, moved=moved)

    @property
    def _machine(self) -> str:
        return machine_id(self.config.storage.machine)

    def _check_constants(self, genesis: Genesis) -> None:
        dataset, budget = self.config.dataset, self.config.budget
        for key, stated, fixed in (
            ("dataset.id", dataset.id, genesis.dataset_id),
            ("dataset.unit", dataset.unit, genesis.unit),
            ("dataset.held_out", decimal(dataset.held_out), genesis.held_out),
            ("budget.epsilon", decimal(budget.epsilon), genesis.epsilon),
            ("budget.delta", decimal(budget.delta), genesis.delta),
        ):
            if stated != fixed:
                raise BadInputError(
                    f"{self.path / 'node.toml'}: {key} is {stated}, must be {fixed}: the ledger was created with it"
                )


def _owner(files: Sequence[LedgerFiles]) -> Owner:
    return Owner(files[0].path, tuple(one.genesis.ledger_id for one in files))


def _files(path: Path, storage: StorageConfig) -> tuple[LedgerFiles, LedgerFiles]:
    """Return where the ledgers of the units that train, and of those held out, lie or would lie."""
    state, witness = path / storage.state, path / storage.witness
    aside = witness.with_name(f"{witness.name}.held-out")
    return LedgerFiles(state / "ledger.db", witness), LedgerFiles(state / "held-out.db", aside)


def _begin_ledgers(
    training: LedgerFiles, held_out: LedgerFiles, dataset: DatasetConfig, budget: BudgetConfig, machine: str
) -> None:
    begun = [files for files in (held_out, training) if files.path.exists()]
    for files in begun:
        files.open(machine).close()  # before what it says is signed a second time
    genesis = Genesis.new(
        public_key=training.public_key(),
        dataset_id=dataset.id,
        split_key=begun[0].genesis.split_key if begun else secrets.token_hex(32),
        unit=dataset.unit,
        epsilon=budget.epsilon,
        delta=budget.delta,
        mode="deployment",
        machine_id=machine,
        held_out=dataset.held_out,
    )
    if dataset.held_out:
        held_out.create(genesis.for_held_out(held_out.public_key()))
    training.create(genesis)


def create_node(
    path: Path,
    *,
    dataset: Mapping[str, object],
    budget: Mapping[str, object],
    storage: Mapping[str, object],
    server: Mapping[str, object] | None = None,
) -> NodeDirectory:
    """Create a node's folder from decisions as a command line gives them; see :meth:`NodeDirectory.create`.

    Raises:
        BadInputError: one of them is not allowed.
    """
    document = {"dataset": dataset, "budget": budget, "storage": storage}
    config = parse_node_config(document if server is None else document | {"server": server}, where=str(path))
    return NodeDirectory.create(
        path,
        dataset=config.dataset,
        budget=config.budget,
        storage=config.storage,
        registry=default_registry(),
        server=config.server,
    )
