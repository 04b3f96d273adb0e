"""The figure of `superposition_of_a_real_moe.py`: one question a panel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from moesaic.bench.palette import DENSE, FOURTH, GRID, INK, MOE, MUTED, PALE_MOE, THIRD
from moesaic.bench.plot_style import panels, save, style

LOOKS = {
    "trained": (MOE, "o", "trained"),
    "initial": (MUTED, "s", "same model before training"),
    "random": (THIRD, "^", "trained features, random experts"),
    "dense": (DENSE, "D", "dense, trained, width k · m"),
}
CLASS_COLOURS = (MOE, FOURTH, DENSE, GRID, MUTED, THIRD)


def draw(result: dict[str, Any], folder: Path) -> None:
    """``superposition.png``: information in the routing, what experts get, and the room that features have in them."""
    counts = result["features"]
    with style():
        figure, grid = panels(2, 3, width=3.9, height=3.3)
        _information(grid[0][0], result)
        _experts(grid[0][1], result)
        _response(grid[0][2], result)
        for axes, kind, words in ((grid[1][0], "byte", "bytes"), (grid[1][1], "pair", "byte pairs")):
            most = min(1, result["expert_width"] / counts[kind])
            _dimensionality(axes, result, kind, f"Room for {counts[kind]} {words} (mean ≤ {most:.2g})")
        _routed(grid[1][2], result)
        handles, names = grid[1][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
        figure.supxlabel(
            f"Features: mean state of a byte or pair (≥ {result['least']} of {result['tokens']:,} tokens) less the "
            "overall mean, seen through the experts' gate weights. One model, one seed; "
            "no intervention, so nothing causal.",
            fontsize=8, color=MUTED,
        )  # fmt: skip
        save(figure, folder, "superposition")


def _layers(axes: Axes, result: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    found = np.arange(1, len(result["models"]["trained"]) + 1)
    axes.set_xticks(found)
    axes.set_xlabel("layer")
    axes.set_xlim(0.5, found[-1] + 0.5)
    return found


def _information(axes: Axes, result: dict[str, Any]) -> None:
    x = _layers(axes, result)
    for name in ("trained", "initial"):
        colour, marker, _ = LOOKS[name]
        for source, dashes in (("byte", "-"), ("class", ":")):
            bits = [layer["bits"][source] for layer in result["models"][name]]
            axes.plot(x, bits, dashes, marker=marker, color=colour, ms=5)
            if name == "trained":
                axes.annotate(
                    {"byte": "which byte", "class": "which class"}[source], (x[-1], bits[-1]), (0, 7), ha="right",
                    textcoords="offset points", fontsize=8, color=colour,
                )  # fmt: skip
    floor = max(layer["bits_shuffled"]["byte"] for layer in result["models"]["trained"])
    axes.axhline(floor, color=INK, lw=0.8, ls="--")
    axes.annotate("shuffled", (0.53, floor), (0, 3), textcoords="offset points", fontsize=8)
    axes.set_ylim(
        0, 1.2 * max(layer["bits"]["byte"] for name in ("trained", "initial") for layer in result["models"][name])
    )
    axes.set(ylabel="mutual information, bits", title="What the choice of expert says")


def _experts(axes: Axes, result: dict[str, Any]) -> None:
    trained = result["models"]["trained"]
    number = int(np.argmax([layer["bits"]["class"] for layer in trained]))
    share = np.array(trained[number]["class_of_expert"])
    share = share[np.lexsort((-share.max(1), share.argmax(1)))]
    bottom = np.zeros(len(share))
    for column, (name, colour) in enumerate(zip(result["classes"], CLASS_COLOURS, strict=True)):
        axes.bar(np.arange(len(share)), share[:, column], 1.0, bottom, color=colour, lw=0, label=name)
        bottom += share[:, column]
    axes.grid(False)
    axes.set_xlim(-0.5, len(share) - 0.5)
    axes.set_ylim(0, 1)
    axes.set_xticks([])
    axes.legend(fontsize=7.5, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    axes.set_title(f"What each expert of layer {number + 1} gets")
    axes.set(ylabel="share of its tokens", xlabel=f"{len(share)} experts, by their main class")


def _response(axes: Axes, result: dict[str, Any]) -> None:
    k, n_experts = result["trained_with"]["top_k"], result["trained_with"]["experts"]
    edges = np.array([0, 0.25, 0.5, 1, 2, 4, 8, np.inf]) * k / n_experts
    for name in ("trained", "initial"):
        colour, marker, _ = LOOKS[name]
        shares, responses = [], []
        for layer in result["models"][name]:
            norms, presence = np.array(layer["byte"]["norms"]), np.array(layer["byte"]["presence"])
            norms = norms / norms.mean(1, keepdims=True)
            responses.append((norms / norms.mean(0)).ravel())
            shares.append(presence.ravel())
        share, response = np.concatenate(shares), np.concatenate(responses)
        bins = np.digitize(share, edges) - 1
        kept = [b for b in range(len(edges) - 1) if (bins == b).sum() >= 20]
        low, middle, high = np.array([np.quantile(response[bins == b], (0.25, 0.5, 0.75)) for b in kept]).T
        axes.errorbar(kept, middle, [middle - low, high - middle], fmt=marker + "-", color=colour, ms=5, elinewidth=1)
    axes.axhline(1, color=INK, lw=0.8, ls="--")
    labels = ["0-¼", "¼-½", "½-1", "1-2", "2-4", "4-8", "8+"]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_title("Do experts answer more to what they get?")
    axes.set(xlabel="share of the byte that it gets, over k / E", ylabel="‖W‖ of a byte, over its mean of experts")


def _dimensionality(axes: Axes, result: dict[str, Any], kind: str, title: str) -> None:
    x = _layers(axes, result)
    series = {name: (layers, kind) for name, layers in result["models"].items()}
    series["random"] = (result["models"]["trained"], f"{kind} random")
    for place, name in enumerate(n for n in LOOKS if n in series):
        colour, marker, words = LOOKS[name]
        layers, key = series[name]
        quartiles = [np.quantile(layer[key]["dimensionality"], (0.25, 0.5, 0.75)) for layer in layers]
        low, middle, high = np.array(quartiles).T
        bars = [middle - low, high - middle]
        axes.errorbar(
            x + 0.12 * (place - 1.5), middle, bars, fmt=marker, color=colour, ms=5, elinewidth=1.2, label=words
        )
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.set_ylabel("dimensionality of a feature\n(median, quartiles over features)")


def _routed(axes: Axes, result: dict[str, Any]) -> None:
    x = _layers(axes, result)
    for shift, (name, pale) in zip((-0.2, 0.2), (("trained", PALE_MOE), ("initial", GRID)), strict=True):
        layers, colour = result["models"][name], LOOKS[name][0]
        everything = [np.median(layer["byte"]["dimensionality"]) for layer in layers]
        routed = [np.median(layer["byte"]["dimensionality_as_routed"]) for layer in layers]
        axes.bar(x + shift, routed, 0.36, color=colour)
        axes.bar(x + shift, everything, 0.36, color=pale)
        exchanged = [np.median(layer["byte"]["dimensionality_exchanged"]) for layer in layers]
        label = "bytes exchanged at random" if name == "trained" else None
        axes.plot(x + shift, exchanged, "_", color=INK, ms=13, mew=1.5, label=label)
    if "dense" in result["models"]:
        dense = [np.median(layer["byte"]["dimensionality"]) for layer in result["models"]["dense"]]
        axes.plot(x, dense, "D", color=LOOKS["dense"][0], ms=5)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.set_title("Room for a byte among those its experts get")
    axes.set_ylabel("median dimensionality of a byte\n(pale: if all bytes came to every expert)")
