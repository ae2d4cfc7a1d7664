"""Models computed token by token, to compare with."""

from __future__ import annotations

import math

import torch

from conclave.model.experts.moe import MoELayer

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "relu": lambda x: x * (x > 0),
    "tanh": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
}


def naive_moe(layer: MoELayer, x_BTD, allowed, config):
    """Token by token, expert by expert; returns output and balance loss, both differentiable."""
    activation, top_k = ACTIVATIONS[config.activation], config.top_k
    held = [e for e in range(len(allowed)) if allowed[e]]
    rows, losses = [], []
    for x_TD in x_BTD:
        chosen_by_token, probs, outs = [], [], []
        for x_D in x_TD:
            exp = {e: torch.exp((layer.router.score.weight[e] * x_D).sum()) for e in held}
            prob = {e: exp[e] / sum(exp.values()) for e in held}
            chosen = sorted(held, key=lambda e: -prob[e].item())[:top_k]
            y = torch.zeros_like(x_D)
            for e in chosen:
                hidden = activation(x_D @ layer.experts.up.weight[e])
                y = y + prob[e] / sum(prob[c] for c in chosen) * (hidden @ layer.experts.down.weight[e])
            if layer.shared is not None:
                hidden = activation(layer.shared.up.weight @ x_D)
                y = y + layer.shared.down.weight @ hidden
            outs.append(y)
            chosen_by_token.append(chosen)
            probs.append(prob)
        aux = torch.zeros((), dtype=x_BTD.dtype)
        for e in held:
            share = sum(e in chosen for chosen in chosen_by_token) / len(chosen_by_token)
            aux = aux + share * sum(prob[e] for prob in probs) / len(probs)
        losses.append(aux * len(held) / top_k)
        rows.append(torch.stack(outs))
    return torch.stack(rows), torch.stack(losses)
