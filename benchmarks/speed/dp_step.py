"""What a private gradient costs beside a plain one: time and peak memory, per mode, in one process, interleaved.

Plain: forward and backward. Private: the clipped sum of per-unit gradients, certified norms included where the mode has
them. ``ratio``: median seconds over the plain step's. Noise comes once a logical batch: by itself it takes
``noise_seconds``.

``step_ratio``: a whole private step, clipped sum, noise and the optimizer's update, over a whole plain step with its
update, by stochastic gradient descent. Noise is drawn by a second thread where a core is free: run it on at least two.
``memory_ratio``: peak of live tensor bytes, parameters included, over
the plain step's. glibc is told to keep freed memory, for both sides: page faults would be most of the difference.
``--scaling`` adds time against the number of experts, ``--strict`` the numeric level strict.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from decoder import Decoder, Size
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conclave.privacy.bookkeeping import Units
from conclave.privacy.gradients.modes import Clipping, GradientMode, mode_for
from conclave.privacy.randomness import derive, standard_normal
from conclave.privacy.training.dpsgd_mechanism import DpSgd
from conclave.privacy.training.private_training import PrivateTraining

DECODERS = [
    Size(32, 64, 65, 128, 256, 8, 2, 4, 4),
    Size(16, 128, 512, 256, 512, 16, 2, 4, 4),
    Size(256, 1, 65, 128, 256, 8, 2, 4, 4),
]
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


class Classifier(nn.Module):
    """A dense model and its per-example loss."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the cross-entropy of each example, [B]."""
        return nn.functional.cross_entropy(self.layers(batch["x"]), batch["y"], reduction="none")


def decoder(size: Size, dtype: torch.dtype, device: str) -> tuple[str, nn.Module, dict[str, Tensor]]:
    model = Decoder(size).to(device, dtype)
    model.allowed_E = model.allowed_E.to(device)
    tokens = [torch.randint(size.vocabulary, (size.batch, size.tokens), device=device) for _ in range(2)]
    return f"decoder {tuple(size)}", model, {"x": tokens[0], "y": tokens[1]}


def models(dtype: torch.dtype, device: str) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
    for size in DECODERS:
        yield decoder(size, dtype, device)
    mlp = Classifier(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    cnn = Classifier(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip
    batch = {
        "x": torch.randn(256, 1, 28, 28, dtype=dtype, device=device),
        "y": torch.randint(10, (256,), device=device),
    }
    yield "mlp 784-512-512-10, batch 256", mlp.to(device, dtype), batch
    yield "cnn 1-16-32, batch 256", cnn.to(device, dtype), batch


class PeakMemory(TorchDispatchMode):
    """Tracks the bytes of live tensors that were made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen:
                    self._seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def measure(
    name: str, model: nn.Module, batch: dict[str, Tensor], modes: list[str], rounds: int
) -> Iterator[dict[str, object]]:
    """Time the plain step and every mode, interleaved."""
    parameters = list(model.parameters())
    units = Units.one_each(len(batch["x"]))
    loss = model.loss  # type: ignore[operator]

    def plain() -> None:
        for p in parameters:
            p.grad = None
        loss(batch).sum().backward()

    def private(attached: GradientMode) -> None:
        for p in parameters:
            p.grad = None
        found = attached.clipped_sum(loss, batch, units, Clipping("flat", 1.0))
        for p, total in zip(parameters, found.sums, strict=True):
            p.grad = total.to(p.dtype)

    def plain_step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss(batch).mean().backward()
        optimizer.step()

    @contextmanager
    def whole(label: str) -> Iterator[Callable[[], None]]:
        """A whole step, after a first one: what is looked at once in a training is not in the time of every step."""
        optimizer = torch.optim.SGD(parameters, lr=1e-9)
        if label == "plain":
            yield lambda: plain_step(optimizer)
            return
        count = len(batch["x"])
        mechanism = DpSgd(
            steps=1, learning_rate=1e-9, sampling_rate=1.0, clip=1.0, noise_multiplier=1.0, declared_size=count,
            gradients=label, physical_batch=count,  # type: ignore[arg-type]
        )  # fmt: skip
        with PrivateTraining(model, optimizer, loss, mechanism, bytes(32)) as training:
            training.step(batch)
            yield lambda: training.step(batch)

    @contextmanager
    def step(label: str) -> Iterator[Callable[[], None]]:
        """Attach before, detach after: in training that happens once."""
        if label == "plain":
            yield plain
            return
        attached = mode_for(label, model)
        yield lambda: private(attached)
        attached.close()

    def timed(work: Callable[[], None]) -> float:
        if batch["x"].is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if batch["x"].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    labels = ["plain", *modes]
    times: dict[str, list[float]] = {label: [] for label in labels}
    whole_times: dict[str, list[float]] = {label: [] for label in labels if label != "strict"}
    peaks: dict[str, int] = {}
    for _ in range(rounds + 2):
        for label, found in times.items():
            with step(label) as work:
                found.append(timed(work))
        for label, found in whole_times.items():
            with whole(label) as work:
                found.append(timed(work))
    own = sum(p.numel() * p.element_size() for p in parameters)
    for label in labels:
        for p in parameters:
            p.grad = None
        with step(label) as work, PeakMemory() as memory:
            work()
        peaks[label] = memory.peak + own
    started = time.perf_counter()
    standard_normal(derive(bytes(32), "benchmark"), sum(p.numel() for p in parameters))
    noise = time.perf_counter() - started
    median = {label: statistics.median(found[2:]) for label, found in times.items()}
    whole_median = {label: statistics.median(found[2:]) for label, found in whole_times.items()}
    base, whole_base = median["plain"], whole_median["plain"]
    for mode in modes:
        seconds = median[mode]
        yield {
            "model": name,
            "mode": mode,
            "ratio": round(seconds / base, 3),
            "step_ratio": round(whole_median[mode] / whole_base, 3) if mode in whole_median else None,
            "memory_ratio": round(peaks[mode] / peaks["plain"], 3),
            "seconds": round(seconds, 5),
            "plain_seconds": round(base, 5),
            "plain_step_seconds": round(whole_base, 5),
            "noise_seconds": round(noise, 4),
            "threads": torch.get_num_threads(),
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--modes", default="bookkeeping,ghost,hooks")
    parser.add_argument("--model", default="", help="only models whose name has this in it")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scaling", action="store_true", help="time against 8, 16, 32 and 64 experts")
    parser.add_argument("--strict", action="store_true", help="strict beside fast, on the first decoder")
    options = parser.parse_args()
    if any(key not in os.environ for key in KEEP_MEMORY):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)

    def show(rows: Iterator[dict[str, object]]) -> None:
        for row in rows:
            print(json.dumps(row) if options.json else row, flush=True)

    if options.scaling:
        for experts in (8, 16, 32, 64):
            size = Size(32, 64, 65, 128, 256, experts, 2, 4, 4)
            show(measure(*decoder(size, dtype, options.device), ["bookkeeping"], options.rounds))
    elif options.strict:
        show(measure(*decoder(DECODERS[0], dtype, options.device), ["bookkeeping", "strict"], 3))
    else:
        for name, model, batch in models(dtype, options.device):
            if options.model not in name:
                continue
            show(measure(name, model, batch, options.modes.split(","), options.rounds))


if __name__ == "__main__":
    main()
