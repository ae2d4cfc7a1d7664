"""A task with a planted partition: eight clusters of tokens, each with a linear rule of its own for its labels.

A token is its cluster's centre plus a part that the rule reads, so that an expert serves one cluster well and two
badly. A layer of eight small experts is trained centrally and without privacy; then held-out tokens show whether the
router has found the clusters, and how evenly it loads the experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

from conclave.model.experts.config import ExpertsConfig
from conclave.model.experts.moe import MoELayer
from conclave.model.routers.config import PolicyRouterConfig
from conclave.model.routers.policy import reinforced
from conclave.model.routers.routing import Routing
from conclave.model.routers.sigmoid import SigmoidRouter, moved_bias

CLUSTERS, WIDTH, TOKENS, CLASSES = 8, 16, 8, 4
BALANCE, NOISE, BIAS_RATE = 0.3, 0.3, 0.01

ROUTERS: dict[str, dict[str, object]] = {
    "softmax": {"kind": "softmax", "noise": NOISE},
    "sigmoid": {"kind": "sigmoid", "noise": NOISE / 5},  # on affinities, which lie in (0, 1)
    "attention": {"kind": "attention", "key_width": 8, "noise": NOISE},
    "hierarchical-learned": {"kind": "hierarchical", "groups": 4, "top_groups": 2, "noise": NOISE},
    "hierarchical-group-limited": {
        "kind": "hierarchical", "style": "group-limited", "groups": 4, "top_groups": 2, "noise": NOISE / 5
    },
    "policy": {"kind": "policy", "rollouts": 2},
    "top-p": {"kind": "top-p", "mass": 0.8, "noise": NOISE},
}  # fmt: skip


class Outcome(NamedTuple):
    """What held-out tokens show.

    information: normalised mutual information between cluster and best expert. imbalance: the busiest expert's load
    over the mean. accuracy: share of right labels. experts: experts per token.
    """

    information: float
    imbalance: float
    accuracy: float
    experts: float


class Planted(nn.Module):
    """An MoE layer between a norm and a linear head, with a loss for every token."""

    def __init__(self, router: dict[str, object], *, balanced: bool) -> None:
        super().__init__()
        self.config = ExpertsConfig.model_validate(
            {"routed": CLUSTERS, "hidden": 8, "top_k": 2, "balance": BALANCE if balanced else 0.0, "router": router}
        )
        self.norm = nn.RMSNorm(WIDTH)
        self.moe = MoELayer(self.config, range(CLUSTERS), WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        """Return scores [B, T, classes] and the routing."""
        y_BTD, routing = self.moe(self.norm(x_BTD), torch.ones(CLUSTERS, dtype=torch.bool))
        return self.head(y_BTD), routing

    def loss(self, x_BTD: Tensor, label_BT: Tensor) -> tuple[Tensor, Routing]:
        """Training loss of each example, and one of its routings."""
        router = self.config.router
        tasks, log_probs, auxiliary = [], [], []
        for _ in range(router.rollouts if isinstance(router, PolicyRouterConfig) else 1):
            scores_BTC, routing = self(x_BTD)
            tasks.append(F.cross_entropy(scores_BTC.transpose(1, 2), label_BT, reduction="none").mean(1))
            log_probs.append(routing.log_prob_B)
            auxiliary.append(self.config.balance * routing.aux_B)
        task_B = tasks[0] if log_probs[0] is None else reinforced(torch.stack(tasks), torch.stack(log_probs))
        return task_B + torch.stack(auxiliary).mean(0), routing


class Task:
    """Clusters, their rules, and draws from them."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        basis, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=self._generator))
        self._center, self._free = basis[:CLUSTERS] * 4.0, basis[CLUSTERS:]
        self._rule = torch.randn(CLUSTERS, CLASSES, WIDTH - CLUSTERS, generator=self._generator)

    def draw(self, examples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return clusters [B, T], tokens [B, T, D] and labels [B, T]."""
        cluster_BT = torch.randint(CLUSTERS, (examples, TOKENS), generator=self._generator)
        u_BTU = torch.randn(examples, TOKENS, WIDTH - CLUSTERS, generator=self._generator)
        label_BT = torch.einsum("btu,btcu->btc", u_BTU, self._rule[cluster_BT]).argmax(-1)
        return cluster_BT, self._center[cluster_BT] + u_BTU @ self._free, label_BT


def run(router: dict[str, object], seed: int, *, balanced: bool = True, steps: int = 600, batch: int = 16) -> Outcome:
    """Train from scratch and measure on held-out data."""
    task, network = Task(seed), Planted(router, balanced=balanced)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # exploration and rollouts
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() > 1:
                fan_in = weight.shape[1]  # of [O, I] and of stacked [E, I, O]
                weight.normal_(generator=generator).div_(fan_in**0.5)
    _, x_BTD, label_BT = task.draw(1024)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(steps):
        chosen = torch.randint(len(x_BTD), (batch,), generator=generator)
        loss_B, routing = network.loss(x_BTD[chosen], label_BT[chosen])
        optimizer.zero_grad()
        loss_B.mean().backward()
        optimizer.step()
        biased = network.moe.router
        if balanced and isinstance(biased, SigmoidRouter):
            moved = moved_bias(biased.selection_bias[:, 0], routing.load(CLUSTERS), BIAS_RATE)
            biased.selection_bias.copy_(moved.unsqueeze(1))
    return measure(network.eval(), *task.draw(512))


@torch.no_grad()
def measure(network: Planted, cluster_BT: Tensor, x_BTD: Tensor, label_BT: Tensor) -> Outcome:
    """Measure without noise or sampling."""
    scores_BTC, routing = network(x_BTD)
    load_E = routing.load(CLUSTERS).double()
    best_N = routing.experts_BTK[..., 0].flatten()
    return Outcome(
        float(normalized_mutual_info_score(cluster_BT.flatten().numpy(), best_N.numpy())),
        float(load_E.max() / load_E.mean()),
        float((scores_BTC.argmax(-1) == label_BT).double().mean()),
        float(routing.mean_experts().mean()),
    )
