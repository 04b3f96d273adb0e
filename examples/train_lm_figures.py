"""The figures of `train_lm.py`: loss curves with their difference, and how often each expert is used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from moesaic.bench.plot_style import DENSE, INK, MOE, MUTED, PALE_MOE, PAPER, panels, save, style
from moesaic.metrics import effective_experts, load_imbalance

SMALLEST = 1e-8
"""Where a difference of exactly zero is drawn on a logarithmic axis."""


def draw_curves(result: dict[str, Any], folder: Path) -> None:
    """``curve.png``: the losses on top of one another; below, by how much they differ."""
    losses, off = result["losses"], result["difference"]
    eager, ours, *others = losses
    steps = np.arange(1, len(losses[eager]) + 1)
    with style():
        figure, ((above,), (below,)) = panels(2, 1, width=6.6, height=2.7, sharex=True)
        held = {name: value / math.log(2) for name, value in result["held_out_nats"].items()}
        above.plot(
            steps, losses[eager], color=PALE_MOE, lw=4, label=f"{eager}: {held[eager]:.2f} bits per held-out byte"
        )
        if "dense" in losses:
            above.plot(
                steps, losses["dense"], color=MUTED, lw=0.8, label=f"dense, equal active width: {held['dense']:.2f}"
            )
        above.plot(steps, losses[ours], color=MOE, lw=1.1, label=f"{ours}: {held[ours]:.2f}")
        above.set_ylabel("loss, nats per byte")
        above.set_title("Training loss: equal weights, equal batches")
        above.legend(frameon=False, fontsize=8)
        for name, color in ((ours, MOE), *((n, DENSE) for n in others if n != "dense")):
            gap = np.abs(np.subtract(losses[name], losses[eager]))
            words = ours if name == ours else "eager again, embedding off by one unit in the last place"
            below.plot(steps, np.maximum(gap, SMALLEST), color=color, lw=1.0, label=words)
        below.axhline(off["allowed"]["largest"], color=INK, lw=1, ls="--")
        below.text(steps[-1], off["allowed"]["largest"] * 1.25, "allowed", ha="right", va="bottom", fontsize=8)
        below.set(
            yscale="log", xlabel="step", ylabel="|difference to eager|, nats; 0 at the foot", ylim=(SMALLEST / 2, 2)
        )
        below.set_title("What is left between the curves: rounding, amplified by training")
        below.legend(frameon=False, fontsize=8, loc="lower right")
        save(figure, folder, "curve")


def draw_usage(before: Tensor, after: Tensor, folder: Path) -> None:
    """``usage.png``: share of the choices that each expert of each layer gets, over the uniform share."""
    n_layers, n_experts = after.shape
    order = after.argsort(dim=-1, descending=True)
    colours = LinearSegmentedColormap.from_list("usage", [DENSE, PAPER, MOE])
    with style():
        figure, rows = panels(2, 1, width=7.2, height=0.55 + 0.34 * n_layers)
        for (axes,), usage, when in zip(rows, (before, after), ("Before", "After"), strict=True):
            over = (usage.gather(-1, order) * n_experts).clamp_min(2**-4).log2()
            image = axes.imshow(over.numpy(), cmap=colours, vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
            axes.set_title(f"{when} training")
            axes.set_yticks(range(n_layers), [f"layer {layer + 1}" for layer in range(n_layers)])
            axes.set_xticks([])
            axes.grid(False)
            effective, most = effective_experts(usage), load_imbalance(usage)
            for layer in range(n_layers):
                words = f"{float(effective[layer]):5.1f}      {float(most[layer]):4.1f}"
                axes.text(1.015, layer, words, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
            axes.text(
                1.015,
                1.02,
                "effective   busiest\nexperts      / mean",
                transform=axes.transAxes,
                fontsize=7.5,
                color=MUTED,
            )
        rows[1][0].set_xlabel(f"the {n_experts} experts of each layer, most used after training first")
        bar = figure.colorbar(image, ax=[axes for (axes,) in rows], location="bottom", aspect=50, shrink=0.7, pad=0.03)
        bar.set_ticks(
            [-3, -2, -1, 0, 1, 2, 3],
            labels=["⅛ or less", "¼", "½", f"uniform: 1/{n_experts}", "2×", "4×", "8× or more"],
        )
        bar.set_label("share of the choices on held-out text, over the uniform share")
        save(figure, folder, "usage")
