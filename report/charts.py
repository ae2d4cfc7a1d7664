"""The report's charts, as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from conclave.model.experts.config import HeldExperts
from conclave.privacy.ledger.reading.spending import Budget

_INK, _MUTED, _ACCENT, _SECOND, _WARN = "#1f2933", "#9aa5b1", "#2563a8", "#c98a1b", "#b3261e"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "conclave",  # the same run gives the same file
}


def accuracy(rounds: Sequence[int], with_experts: Sequence[float], without: Sequence[float]) -> str:
    """Accuracy of the global model per round, with and without its routed experts."""
    with mpl.rc_context(_STYLE):
        figure, axes = _new("round", "accuracy on public test records")
        _two_curves(axes, rounds, with_experts, without)
        axes.set_ylim(0, 1)
        axes.legend(frameon=False, loc="center right")
        return _svg(figure)


def bits_per_byte(rounds: Sequence[int], with_experts: Sequence[float], without: Sequence[float], order0: float) -> str:
    """Bits per byte of the global model per round, against the entropy of the bytes without context."""
    with mpl.rc_context(_STYLE):
        figure, axes = _new("round", "bits per byte on public test windows")
        _two_curves(axes, rounds, with_experts, without)
        axes.axhline(order0, color=_SECOND, linewidth=1.2, linestyle="--", label="order-0 entropy")
        axes.set_ylim(0, 9)
        axes.legend(frameon=False, loc="lower right")
        return _svg(figure)


def _two_curves(axes: Axes, rounds: Sequence[int], with_experts: Sequence[float], without: Sequence[float]) -> None:
    axes.plot(rounds, with_experts, color=_ACCENT, linewidth=2, label="global model")
    axes.plot(rounds, without, color=_MUTED, linewidth=1.5, linestyle="--", label="routed experts silenced")


def epsilon(names: Sequence[str], spent: Sequence[float], budget: float) -> str:
    """ε spent by each node against its budget."""
    with mpl.rc_context(_STYLE):
        figure, axes = _new("node", "ε spent")
        colors = [_ACCENT if value <= budget else _WARN for value in spent]
        axes.bar(range(len(names)), spent, color=colors, width=0.6)
        axes.axhline(budget, color=_WARN, linewidth=1.2, linestyle="--", label=f"budget ε = {budget:g}")
        _name_ticks(axes, names)
        axes.set_ylim(0, budget * 1.25)
        axes.legend(frameon=False, loc="upper right")
        return _svg(figure)


def budget(found: Budget) -> str:
    """ε after each charge of a ledger, what open plans may still draw, and the budget."""
    spent = [0.0, *(value for _, value in found.curve if value != float("inf"))]
    with mpl.rc_context(_STYLE):
        figure, axes = _new("charge", f"ε spent at δ = {found.delta:g}")
        axes.step(range(len(spent)), spent, where="post", color=_ACCENT, linewidth=2, label="spent")
        if spent[-1] < found.committed_to < float("inf"):
            axes.axhspan(spent[-1], found.committed_to, color=_SECOND, alpha=0.25, label="set aside for open plans")
        axes.axhline(found.epsilon, color=_WARN, linewidth=1.2, linestyle="--", label=f"budget ε = {found.epsilon:g}")
        axes.set_ylim(0, found.epsilon * 1.25)
        axes.set_xlim(left=0)
        axes.legend(frameon=False, loc="upper left", ncols=3, fontsize=8)
        return _svg(figure)


def experts_held(held: Mapping[str, HeldExperts], experts: int) -> str:
    """Which node holds which experts: one panel a layer, a row for each node, a filled cell for each expert held."""
    nodes, layers = list(held), len(next(iter(held.values())))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(1.2 + layers * (0.6 + experts * 0.17), 0.9 + len(nodes) * 0.17), layout="constrained")
        panels = figure.subplots(1, layers, squeeze=False, sharey=True)[0]
        for layer, axes in enumerate(panels):
            cells = [[float(expert in held[node][layer]) for expert in range(experts)] for node in nodes]
            axes.pcolormesh(cells, cmap=ListedColormap(["#eef1f4", _ACCENT]), vmin=0, vmax=1, edgecolor="white")
            axes.set_title(f"layer {layer}", fontsize=9)
            axes.set_xlabel("expert")
            axes.invert_yaxis()
            every = max(1, experts // 8)
            axes.set_xticks([e + 0.5 for e in range(0, experts, every)], [str(e) for e in range(0, experts, every)])
        every = max(1, len(nodes) // 20)
        panels[0].set_yticks([n + 0.5 for n in range(0, len(nodes), every)], nodes[::every])
        return _svg(figure)


def load(shares: Sequence[float], title: str, private: Sequence[float | None] | None = None) -> str:
    """Share of routed tokens that each expert of one layer received, with the even share marked.

    Args:
        private: where loads are released, each expert's noised one relative to what its holders expected.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _new("expert", "share of routed tokens")
        axes.bar(range(len(shares)), shares, color=_ACCENT, width=0.6, label="public test records")
        known = [(expert, value / len(shares)) for expert, value in enumerate(private or ()) if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "D", color=_INK, markersize=4, label="released by nodes, noised")
        axes.axhline(1 / len(shares), color=_SECOND, linewidth=1.2, linestyle="--", label="even share")
        _name_ticks(axes, [str(index) for index in range(len(shares))])
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_ylim(top=axes.get_ylim()[1] * 1.2)  # room for the legend above the tallest bar
        axes.legend(frameon=False, loc="upper right", ncols=3, fontsize=8)
        return _svg(figure)


def holders(mean: Sequence[float], without: Sequence[int], title: str) -> str:
    """Mean holders per round of each expert of one layer; above the bar, in how many rounds it had none, if any."""
    with mpl.rc_context(_STYLE):
        figure, axes = _new("expert", "holders a round")
        axes.bar(range(len(mean)), mean, color=_ACCENT, width=0.6)
        for expert, rounds in enumerate(without):
            if rounds:
                axes.annotate(
                    f"{rounds} × 0", (expert, mean[expert]), ha="center", va="bottom", color=_WARN, fontsize=7
                )
        _name_ticks(axes, [str(index) for index in range(len(mean))])
        axes.set_title(title, loc="left", fontsize=9)
        return _svg(figure)


def traffic(rounds: Sequence[int], down: Sequence[int], up: Sequence[int], full: int) -> str:
    """Bytes per node and round, both ways, against sending the whole model both ways."""
    with mpl.rc_context(_STYLE):
        figure, axes = _new("round", "kB per node")
        kilo_down, kilo_up = [b / 1e3 for b in down], [b / 1e3 for b in up]
        axes.bar(rounds, kilo_down, color=_ACCENT, width=1.0, label="to the node")
        axes.bar(rounds, kilo_up, bottom=kilo_down, color=_SECOND, width=1.0, label="from the node")
        axes.axhline(full / 1e3, color=_INK, linewidth=1.2, linestyle="--", label="whole model, both ways")
        axes.set_ylim(0, max(full, *map(sum, zip(down, up, strict=True))) / 1e3 * 1.35)
        axes.legend(frameon=False, loc="upper right", ncols=3, fontsize=8)
        return _svg(figure)


def _new(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y")
    return figure, axes


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    every = max(1, len(names) // 20)
    axes.set_xticks(range(0, len(names), every), names[::every])


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
