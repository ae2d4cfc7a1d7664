"""What a round asks and publishes where the node is the unit."""

from __future__ import annotations

from collections.abc import Sequence

from safetensors.torch import load
from torch import Tensor

from conclave.base.errors import BadInputError
from conclave.model.experts.config import HeldExperts
from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.ledger import (
    AlreadyChargedError,
    BudgetExhaustedError,
    ChargeAbandonedError,
    ReplyExpiredError,
    Reservation,
    StoredReply,
)
from conclave.protocol.plan import Plan
from conclave.protocol.tensor_array import pack
from conclave.server.node_level.account import NodeAccount, plan_hash_of
from conclave.server.node_level.config import NodePrivacyConfig
from conclave.server.node_level.mechanism import NodeLevelSum, own_experts, secret_cohort


class NodeLevelRounds:
    """Draws secret cohorts, and turns their replies into what may be published; each round is charged."""

    def __init__(
        self,
        account: NodeAccount,
        *,
        config: NodePrivacyConfig,
        mechanism: SampledGaussian,
        plan: Plan,
        run_id: str,
        experts_per_node: int,
        seed: int,
    ) -> None:
        """Set up a run; ``mechanism`` is what one round is charged as."""
        self._account, self._config, self._mechanism = account, config, mechanism
        self._plan, self._run_id, self._count, self._seed = plan, run_id, experts_per_node, seed
        self._plan_hash = plan_hash_of(plan, config)
        self._paid: Reservation | StoredReply | None = None

    def begin(self, nodes: Sequence[str], round_number: int) -> dict[str, HeldExperts]:
        """Charge a round and return its secret cohort: node → what it trains.

        Nobody is asked in a round that was committed before, or that was given up after crashes.

        Raises:
            BadInputError: the account does not allow the round, or has forgotten what it published.
        """
        try:
            self._paid = self._account.reserve(
                self._run_id, round_number, self._plan_hash, self._mechanism, self._config.clip
            )
        except ChargeAbandonedError:
            self._paid = None
        except BudgetExhaustedError as error:
            raise BadInputError(
                f"node_privacy: epsilon {self._config.epsilon:g} is spent, must leave room for round {round_number}"
            ) from error
        except AlreadyChargedError as error:
            raise BadInputError(
                f"node_privacy: round {round_number} was charged for another plan before, must go on with that plan"
            ) from error
        except ReplyExpiredError as error:
            raise BadInputError(
                f"node_privacy: round {round_number} was published before and its step is no longer kept, "
                "must go on from the run's checkpoint"
            ) from error
        if not isinstance(self._paid, Reservation):
            return {}
        experts = self._plan.model.experts.routed
        return {
            node: own_experts(
                node,
                experts=experts,
                count=self._count,
                layers=self._plan.model.layers,
                seed=self._seed,
                round_number=round_number,
            )
            for node in secret_cohort(nodes, self._mechanism.sampling_rate, self._paid.secret)
        }

    def collect(self, nodes: Sequence[str]) -> NodeLevelSum:
        """Return what the contributions of a cohort are added to."""
        return NodeLevelSum(
            nodes,
            shapes=self._plan.travelling(self._plan.model.all_experts),
            clip=self._config.clip,
            noise_multiplier=self._mechanism.noise_multiplier,
            expected_nodes=self._mechanism.sampling_rate * self._config.nodes,
            expert_share=self._count / self._plan.model.experts.routed,
        )

    def publish(self, collected: NodeLevelSum) -> dict[str, Tensor]:
        """Commit the round's noised step and return it: every tensor, or none in a round that was given up."""
        if self._paid is None:
            return {}
        body = (
            self._account.commit(self._paid, pack(collected.result(self._paid.secret)))
            if isinstance(self._paid, Reservation)
            else self._paid.body
        )
        return load(body)

    def close(self) -> None:
        """Close the account's file."""
        self._account.ledger.close()
