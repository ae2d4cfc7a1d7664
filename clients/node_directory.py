"""A node's folder: its configuration, its ledger and the ledger's key, and what the owner does with them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from clients.node_config import (
    BudgetConfig,
    DatasetConfig,
    NodeConfig,
    StorageConfig,
    default_text,
    parse_node_config,
    read_node_config,
)
from model.errors import BadInputError
from model.store import write_atomically
from privacy.canonical import decimal
from privacy.ledger import Genesis, Ledger
from privacy.ledger.heads import public_hex
from privacy.ledger.keys import create_key, load_key
from privacy.ledger.machine import machine_id
from privacy.ledger.reading import LedgerFile
from privacy.ledger.recovery import Recovery, recover
from privacy.ledger.registry import claim, default_registry
from privacy.ledger.witness import Witness


class NodeDirectory:
    """The folder that holds a ``node.toml``."""

    def __init__(self, path: Path) -> None:
        """Read the configuration.

        Raises:
            BadInputError: there is none, or it cannot be used.
        """
        self.path = path
        self.config: NodeConfig = read_node_config(path / "node.toml")
        state = path / self.config.storage.state
        self.ledger_path, self.key_path = state / "ledger.db", state / "ledger.key"
        self._next_key_path = state / "ledger.key.next"
        self.witness = Witness(path / self.config.storage.witness)

    @classmethod
    def create(
        cls, path: Path, *, dataset: DatasetConfig, budget: BudgetConfig, storage: StorageConfig, registry: Path
    ) -> NodeDirectory:
        """Write ``node.toml``, and create key, ledger and witness.

        Args:
            registry: where datasets that have a ledger are noted.

        Raises:
            BadInputError: the folder is a node's already, the dataset has a ledger, or the budget allows nothing.
        """
        config_path = path / "node.toml"
        if config_path.exists():
            raise BadInputError(f"{config_path}: exists already, must be a new node")
        ledger_path = path / storage.state / "ledger.db"
        claim(registry, dataset.id, path / dataset.data, ledger_path)
        try:
            ledger_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise BadInputError(f"{ledger_path.parent}: cannot be created ({error.strerror})") from error
        key_path = ledger_path.with_name("ledger.key")
        key = load_key(key_path) if key_path.exists() else create_key(key_path)  # an interrupted attempt left it
        genesis = Genesis.new(
            public_key=public_hex(key),
            dataset_id=dataset.id,
            split_key=secrets.token_hex(32),
            unit=dataset.unit,
            epsilon=budget.epsilon,
            delta=budget.delta,
            mode="deployment",
            machine_id=machine_id(storage.machine),
        )
        Ledger.create(ledger_path, genesis, key, witness=Witness(path / storage.witness)).close()
        write_atomically(config_path, default_text(dataset, budget, storage).encode())
        return cls(path)

    def open_ledger(self) -> Ledger:
        """Open the ledger for work.

        Raises:
            BadInputError: it was restored or copied, its witness is missing or ahead, the machine or the key is
                another, or the configuration states another budget, dataset or unit than the ledger was created with.
        """
        self._finish_rotation()
        self._check_constants(LedgerFile(self.ledger_path).genesis)
        return Ledger(
            self.ledger_path,
            load_key(self.key_path),
            witness=self.witness,
            machine=machine_id(self.config.storage.machine),
        )

    def rotate_key(self) -> str:
        """Replace the ledger's signing key by a new one; return its public half. A crash leaves one of the two in use.

        Raises:
            BadInputError: see :meth:`open_ledger`.
        """
        ledger = self.open_ledger()
        try:
            self._next_key_path.unlink(missing_ok=True)
            new_key = create_key(self._next_key_path)
            ledger.rotate_key(new_key)
        finally:
            ledger.close()
        self._next_key_path.replace(self.key_path)
        return public_hex(new_key)

    def restore(self, evidence: Path | None = None) -> Recovery:
        """Start again from a restored or moved ledger; see :mod:`privacy.ledger.recovery`.

        Raises:
            BadInputError: it is no ledger of this node, or the evidence does not hold.
        """
        self._finish_rotation()
        self._check_constants(LedgerFile(self.ledger_path).genesis)
        return recover(
            self.ledger_path,
            load_key(self.key_path),
            witness=self.witness,
            machine=machine_id(self.config.storage.machine),
            evidence=evidence,
        )

    def _finish_rotation(self) -> None:
        """Where a crash came between the ledger's new key and the key file's, finish."""
        if self._next_key_path.exists():
            next_key = load_key(self._next_key_path)
            if LedgerFile(self.ledger_path).head.signed_by(public_hex(next_key)):
                self._next_key_path.replace(self.key_path)

    def _check_constants(self, genesis: Genesis) -> None:
        dataset, budget = self.config.dataset, self.config.budget
        for key, stated, fixed in (
            ("dataset.id", dataset.id, genesis.dataset_id),
            ("dataset.unit", dataset.unit, genesis.unit),
            ("budget.epsilon", decimal(budget.epsilon), genesis.epsilon),
            ("budget.delta", decimal(budget.delta), genesis.delta),
        ):
            if stated != fixed:
                raise BadInputError(
                    f"{self.path / 'node.toml'}: {key} is {stated}, must be {fixed}: the ledger was created with it"
                )


def create_node(
    path: Path, *, dataset: Mapping[str, object], budget: Mapping[str, object], storage: Mapping[str, object]
) -> NodeDirectory:
    """Create a node's folder from decisions as a command line gives them; see :meth:`NodeDirectory.create`.

    Raises:
        BadInputError: one of them is not allowed.
    """
    config = parse_node_config({"dataset": dataset, "budget": budget, "storage": storage}, where=str(path))
    return NodeDirectory.create(
        path, dataset=config.dataset, budget=config.budget, storage=config.storage, registry=default_registry()
    )
