"""Recall over 96 tokens: what attention is for, and what latent attention saves of it.

A window holds random lower-case letters, one capital letter out of 16 among them, and at its end the question mark
that asks for it, exactly 96 tokens after the capital; the byte after the question mark is the capital. A model that
sees no other token can only guess: 1/16. Each is trained centrally, without privacy, by Adam on the answer alone.

The models are equally wide: ``transformer`` with multi-head and with latent attention, and the same without attention,
as the presets moe and deep-moe are. One JSON object a line with --json: attention, parameters (of those, in_attention),
accuracy on fresh windows, steps until 99 % of five batches in a row were right (or the limit), training seconds,
step_ms (median of a forward and backward pass of the untrained models, interleaved: attention of a trained one is so
sharp that its small numbers are subnormal, which a CPU takes seven times as long for), spread (slowest over fastest
step: far above 1.3, the machine was not quiet) and cache_bytes, what a generating model would keep of each past token
in all layers in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from conclave.model.attention.config import LatentConfig
from conclave.model.building import build
from conclave.model.config import ModelConfig
from conclave.model.network import Network

DISTANCE, FILLER, CAPITALS, QUESTION = 96, (97, 123), (65, 81), 63
CHANCE = 1.0 / (CAPITALS[1] - CAPITALS[0])

ATTENTIONS: dict[str, dict[str, object] | None] = {
    "multi-head": {"kind": "multi-head", "heads": 4},
    "latent": {"kind": "latent", "heads": 4, "kv_rank": 16, "query_rank": 24, "rope_width": 8},
    "none": None,
}


def windows(count: int, generator: torch.Generator) -> Tensor:
    """Draw windows [count, 106] of bytes: 8 letters, the capital, 95 letters, ``?``, the capital again."""
    text_BT = torch.randint(*FILLER, (count, 8 + DISTANCE + 2), generator=generator)
    capital_B = torch.randint(*CAPITALS, (count,), generator=generator)
    text_BT[:, 8] = text_BT[:, -1] = capital_B
    text_BT[:, -2] = QUESTION
    return text_BT.to(torch.uint8)


def make(attention: str, *, width: int = 64, layers: int = 1, seed: int = 1) -> Network:
    """Build a model of the given kind of attention."""
    config = ModelConfig.model_validate(
        {
            "preset": "transformer",
            "width": width,
            "layers": layers,
            "attention": ATTENTIONS[attention] or ATTENTIONS["multi-head"],
            "encoder": {"kind": "bytes", "window": 256},
            "experts": {"routed": 4, "hidden": width, "top_k": 2},
            "head": {"kind": "next-byte"},
        }
    )
    network = build(config, seed)
    if ATTENTIONS[attention] is None:  # presets without attention refuse bytes, for the very reason measured here
        for block in network.blocks:
            block.attention = None
    return network


def answer_loss(network: Network, text_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of the answer and the share of right answers."""
    scores_BV = network({"text": text_BT[:, :-1]}).scores[:, -1]
    answer_B = text_BT[:, -1].long()
    return F.cross_entropy(scores_BV, answer_B), (scores_BV.argmax(dim=1) == answer_B).double().mean()


def train(network: Network, *, steps: int, batch: int = 32, learning_rate: float = 3e-3, seed: int = 2) -> int:
    """Train until 99 % of each of 5 batches in a row are right, at most ``steps``; return how many it took."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    right = 0
    for step in range(steps):
        optimizer.zero_grad()
        loss, accuracy = answer_loss(network, windows(batch, generator))
        loss.backward()
        optimizer.step()
        right = right + 1 if accuracy >= 0.99 else 0
        if right == 5:
            return step + 1
    return steps


def accuracy(network: Network, *, count: int = 1024, seed: int = 3) -> float:
    """Return the share of right answers on windows that training did not see."""
    with torch.inference_mode():
        return float(answer_loss(network, windows(count, torch.Generator().manual_seed(seed)))[1])


def cache_bytes(network: Network) -> int:
    """Return what generating keeps of a past token: of multi-head attention key and value, of latent less."""
    attention, layers = network.config.attention, network.config.layers
    if all(block.attention is None for block in network.blocks):
        return 0
    latent = isinstance(attention, LatentConfig)
    values = attention.kv_rank + attention.rope_width if latent else 2 * network.config.width
    return 4 * layers * values


def step_times(networks: dict[str, Network], repeats: int) -> dict[str, list[float]]:
    """Time a forward and backward pass of a batch of 32 of every model, interleaved, after one warm-up."""
    text_BT = windows(32, torch.Generator().manual_seed(4))
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(repeats + 1):
        for name, network in networks.items():
            started = time.perf_counter()
            answer_loss(network, text_BT)[0].backward()
            times[name].append(time.perf_counter() - started)
    return {name: seconds[1:] for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    networks = {name: make(name, width=options.width, layers=options.layers) for name in ATTENTIONS}
    times = step_times(networks, options.repeats)
    for name, network in networks.items():
        started = time.perf_counter()
        steps = train(network, steps=options.steps if ATTENTIONS[name] else min(options.steps, 300))
        seconds = time.perf_counter() - started
        in_attention = [p.numel() for key, p in network.named_parameters() if ".attention." in key]
        row = {
            "attention": name,
            "width": options.width,
            "layers": options.layers,
            "parameters": sum(p.numel() for p in network.parameters()),
            "in_attention": sum(in_attention),
            "accuracy": round(accuracy(network), 4),
            "chance": CHANCE,
            "steps": steps,
            "seconds": round(seconds, 1),
            "step_ms": round(1000 * statistics.median(times[name]), 2),
            "spread": round(max(times[name]) / min(times[name]), 2),
            "cache_bytes": cache_bytes(network),
            "load": round(os.getloadavg()[0], 2),
        }
        print(json.dumps(row) if options.json else row)


if __name__ == "__main__":
    main()
