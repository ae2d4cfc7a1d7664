"""The server's own ledger: what it published at node level, charged before it is computed."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from conclave.base.canonical import sha256
from conclave.base.errors import BadInputError
from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.ledger import ChargeRequest, Genesis, Ledger, Reservation, StoredReply
from conclave.privacy.ledger.genesis import Mode
from conclave.privacy.ledger.heads import public_hex
from conclave.privacy.ledger.keys import create_key, load_key
from conclave.privacy.ledger.machine import machine_id
from conclave.privacy.ledger.witness import Witness
from conclave.privacy.randomness import derive, fresh_secret
from conclave.protocol.code_identity import code_hash
from conclave.protocol.plan import Plan
from conclave.server.node_level.config import NodePrivacyConfig

KIND = "aggregate"


class NodeAccount:
    """The account of one run, whose unit is the node. It lives in the run directory, as the server's own file.

    Its witness lies next to it: that reveals an older database, but not an older copy of the whole directory.
    In a simulation it is derived from the scenario's seed, so that the run can be repeated, and says so; otherwise from
    the operating system.
    """

    def __init__(self, ledger: Ledger, seed: int) -> None:
        self.ledger = ledger
        self._seed = seed

    @classmethod
    def open(cls, path: Path, config: NodePrivacyConfig, seed: int) -> NodeAccount:
        """Open the account of a run, or begin one.

        Raises:
            BadInputError: the account, or its key, is damaged or missing.
        """
        key_path = path.with_suffix(".key")
        if not path.exists():
            if key_path.exists():
                raise BadInputError(f"{path}: missing, must lie beside {key_path.name}")
            key = create_key(key_path)
            genesis = _genesis(config, key, "deployment")
            return cls(Ledger.create(path, genesis, key, witness=Witness(path.with_suffix(".witness"))), seed)
        if not key_path.exists():
            return cls(Ledger(path, _seeded_key(seed)), seed)
        witness = Witness(path.with_suffix(".witness"))
        return cls(Ledger(path, load_key(key_path), witness=witness, machine=machine_id()), seed)

    @classmethod
    def begin_simulated(cls, path: Path, config: NodePrivacyConfig, seed: int) -> None:
        """Begin the account of a simulation, if there is none yet; it is repeatable and not private."""
        if not path.exists():
            key = _seeded_key(seed)
            Ledger.create(path, _genesis(config, key, "simulation"), key).close()

    def reserve(
        self, run_id: str, round_number: int, plan_hash: str, mechanism: SampledGaussian, clip: float
    ) -> Reservation | StoredReply:
        """Charge a round, durably, before its cohort is drawn; the reservation's secret seeds cohort and noise.

        After a crash the same round gets the same secret, or what was committed before: it is published once.

        Raises:
            AlreadyChargedError, BudgetExhaustedError, ChargeAbandonedError, ReplyExpiredError: see there.
        """
        seeded = self.ledger.genesis.mode == "simulation"
        request = published_charge(run_id, round_number, plan_hash, mechanism, clip, seeded=seeded)
        secret = derive(self._seed.to_bytes(32, "big"), "node level", round_number) if seeded else fresh_secret()
        return self.ledger.reserve(request, secret)

    def commit(self, reservation: Reservation, step: bytes) -> bytes:
        """Keep the noised step, before anybody sees it; return what may be published."""
        return self.ledger.commit(reservation, step).body


def plan_hash_of(plan: Plan, config: NodePrivacyConfig) -> str:
    """Return what names a run's plan in the account: what nodes are asked, and how the node is protected."""
    return sha256((plan.hash + config.json_for_hash()).encode())


def published_charge(
    run_id: str, round_number: int, plan_hash: str, mechanism: SampledGaussian, clip: float, *, seeded: bool
) -> ChargeRequest:
    """Return what publishing a round's model is charged as; the account draws it, and audits compare with it."""
    return ChargeRequest(
        kind=KIND,
        run_id=run_id,
        round=round_number,
        plan_hash=plan_hash,
        model_in_hash="",
        code_hash=code_hash(),
        mechanism=mechanism,
        clip=clip,
        releases=("model",),
        numeric="fast",
        rng="seeded" if seeded else "os-entropy",
    )


def _seeded_key(seed: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(derive(seed.to_bytes(32, "big"), "node-level ledger key"))


def _genesis(config: NodePrivacyConfig, key: Ed25519PrivateKey, mode: Mode) -> Genesis:
    return Genesis.new(
        public_key=public_hex(key),
        dataset_id="nodes",
        split_key="",
        unit="node",
        epsilon=config.epsilon,
        delta=config.delta,
        mode=mode,
        machine_id="simulation" if mode == "simulation" else machine_id(),
    )
