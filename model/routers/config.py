"""Configuration of the routers: one table per kind; ``model/routers/<kind>.py`` says what each computes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from conclave.base.frozen import Frozen


class RouterOptions(Frozen):
    """What every router can be given besides its kind; all of it is per example.

    ``balance_loss`` is what ``experts.balance`` weighs: ``sequence`` spreads the tokens of an example over experts and
    says little about an example of one token; ``uniform`` adds up over examples to the imbalance of the whole batch,
    and suits single tokens (see :mod:`conclave.model.routers.penalties`). ``entropy`` weighs a bonus for undecided
    routing.
    """

    balance_loss: Literal["sequence", "uniform"] = "sequence"
    entropy: float = Field(default=0.0, ge=0.0, le=10.0)

    @property
    def biased(self) -> bool:
        """Whether the router has a selection bias, a value per expert that changes the choice and never the weight."""
        return False


class NoisyRouterOptions(RouterOptions):
    """``noise`` is the scale of Gumbel noise on the choice of experts while training, never on their weights."""

    noise: float = Field(default=0.0, ge=0.0, le=100.0)


class OptionalBias(NoisyRouterOptions):
    """``selection_bias`` gives every expert a bias on its logit, which affects the choice but not the weight."""

    younger: ClassVar[frozenset[str]] = frozenset({"selection_bias"})
    selection_bias: bool = False

    @property
    def biased(self) -> bool:
        """Whether the router has a selection bias."""
        return self.selection_bias


class SoftmaxRouterConfig(OptionalBias):
    """Softmax over experts, the best kept. ``z_loss`` weighs the squared log-sum-exp of the scores."""

    kind: Literal["softmax"] = "softmax"
    z_loss: float = Field(default=0.0, ge=0.0, le=10.0)


class SigmoidRouterConfig(NoisyRouterOptions):
    """Sigmoid affinities with a selection bias, which the aggregating server moves against the load."""

    kind: Literal["sigmoid"] = "sigmoid"

    @property
    def biased(self) -> bool:
        """Whether the router has a selection bias."""
        return True


class AttentionRouterConfig(OptionalBias):
    """``heads`` queries of ``key_width`` values, made from a token and its context, against one key per expert."""

    kind: Literal["attention"] = "attention"
    heads: int = Field(default=2, ge=1, le=256)
    key_width: int = Field(default=16, ge=1, le=4096)
    z_loss: float = Field(default=0.0, ge=0.0, le=10.0)


class HierarchicalRouterConfig(NoisyRouterOptions):
    """First ``top_groups`` of ``groups``, then the best experts in them.

    ``learned``: a softmax over groups times one within each. ``group-limited``: sigmoid affinities with a selection
    bias, a group counting as much as its best two.
    """

    kind: Literal["hierarchical"] = "hierarchical"
    style: Literal["learned", "group-limited"] = "learned"
    groups: int = Field(ge=1, le=4096)
    top_groups: int = Field(ge=1, le=4096)

    @property
    def biased(self) -> bool:
        """Whether the router has a selection bias."""
        return self.style == "group-limited"

    @model_validator(mode="after")
    def _groups_exist(self) -> HierarchicalRouterConfig:
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups is {self.top_groups}, must be at most the {self.groups} groups")
        return self

    def check_fits(self, routed: int, top_k: int) -> None:
        """Raise ValueError where groups of ``routed`` experts cannot be formed or cannot supply ``top_k``."""
        if routed % self.groups:
            raise ValueError(f"router.groups is {self.groups}, must divide the {routed} routed experts")
        size = routed // self.groups
        if self.style == "group-limited" and size < 2:
            raise ValueError(
                f"router.groups is {self.groups}, must be at most {routed // 2} for style group-limited: "
                "a group counts as much as its best two experts"
            )
        if top_k > self.top_groups * size:
            most = self.top_groups * size
            raise ValueError(f"top_k is {top_k}, must be at most the {most} experts of router.top_groups")


class PolicyRouterConfig(RouterOptions):
    """Experts are sampled, and the router learns by REINFORCE from ``rollouts`` samples of each example."""

    kind: Literal["policy"] = "policy"
    rollouts: int = Field(default=2, ge=2, le=64)
    z_loss: float = Field(default=0.0, ge=0.0, le=10.0)

    @property
    def noise(self) -> float:
        """Scale of the Gumbel noise on the choice: 1 makes it a sample from the router's own distribution."""
        return 1.0


class TopPRouterConfig(NoisyRouterOptions):
    """As many of the best experts as reach the probability ``mass``, at least one and at most ``top_k``."""

    kind: Literal["top-p"] = "top-p"
    mass: float = Field(default=0.8, gt=0.0, le=1.0)
    z_loss: float = Field(default=0.0, ge=0.0, le=10.0)


RouterConfig = Annotated[
    SoftmaxRouterConfig
    | SigmoidRouterConfig
    | AttentionRouterConfig
    | HierarchicalRouterConfig
    | PolicyRouterConfig
    | TopPRouterConfig,
    Field(discriminator="kind"),
]
