"""Figures of the trained models that a sweep kept: loss curves, weights, and interference between features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

from moesaic.bench.analysis import EQUAL_FLOPS, EQUAL_WIDTH, LOSS, Cell, Comparison, in_grid
from moesaic.bench.figure_parts import by_dataset, few_architectures, few_datasets, heading, left_out
from moesaic.bench.figures import Drawn
from moesaic.bench.models import Kept, load_kept
from moesaic.bench.plan import Row
from moesaic.bench.plot_style import DENSE, FOURTH, INK, MOE, MUTED, THIRD, log_axis, panels, save, style

MAX_CURVES = 6
MAX_MAPPED_DATASETS = 2
MAX_FEATURES = 128
EXPERTS = 3
"""Most experts of a model whose interference is shown."""
_POINTS = 120
_PALETTE = (DENSE, MOE, THIRD, FOURTH, INK, MUTED)
Array = NDArray[np.float64]


class Model(NamedTuple):
    """What was kept of a run, and the run's row: the first seed of a cell may not be the one that was kept."""

    row: Row
    kept: Kept


def model_figures(found: Sequence[Cell], compared: Sequence[Comparison], run_dir: Path, folder: Path) -> list[Drawn]:
    """Draw loss curves and maps of the kept models of ``run_dir`` into ``folder``; nothing where none was kept.

    Raises:
        InputError: a kept model is damaged.
    """
    grid = in_grid(found)
    shown = few_datasets(grid)
    models = load_models(shown, run_dir)
    drawn = []
    with style():
        curves = loss_curves(shown, models)
        mapped = {d: maps(cells, models) for d, cells in chosen(shown, compared, models).items()}
    mapped_of = f" {len(mapped)} of {len(by_dataset(grid))} data sets." if len(mapped) < len(by_dataset(grid)) else ""
    omitted = left_out([c for c in grid if c.dataset in by_dataset(shown)], grid)
    if curves is not None:
        drawn.append(Drawn("losses", _LOSSES[0], _LOSSES[1] + omitted, save(curves, folder, "losses")))
    for i, (dataset, figure) in enumerate(mapped.items(), 1):
        title, caption = _MAPS[0], _MAPS[1] + mapped_of
        name = f"weights-{i}"
        drawn.append(Drawn(name, f"{title}: {dataset}", caption, save(figure, folder, name)))
    return drawn


def load_models(found: Sequence[Cell], run_dir: Path) -> dict[tuple[str, str], Model]:
    """The first kept model of each cell, by data set and architecture."""
    models: dict[tuple[str, str], Model] = {}
    for cell in found:
        for row in cell.rows:
            if (kept := load_kept(run_dir, str(row["run_key"]))) is not None:
                models[cell.dataset, cell.architecture] = Model(row, kept)
                break
    return models


_LOSSES = (
    "Loss curves",
    "Loss of the training batches, averaged over steps whose number grows with the step, of the first seed of the kept "
    "models, at most six: the MoE of lowest held-out loss and the dense models it is compared with. Samples and "
    "importance differ between data sets, so levels compare within a panel only.",
)
_MAPS = (
    "Weights and interference",
    "One trained model of the first seed per row. Left, W: a row per hidden dimension, experts one below the other, "
    "a shared one first, then the most used; a column per feature. Right, of at most three experts in that order: "
    "entry (i, j) is what feature j adds to the output of feature i before bias, ReLU and the gate's weight, the "
    "diagonal is what it gives itself; D is an untied decoder. Blue is positive, orange negative, full "
    "colour the largest of the picture. More than 128 features: those of largest norm.",
)


def loss_curves(found: Sequence[Cell], models: Mapping[tuple[str, str], Model]) -> Figure | None:
    """Training loss against step, a panel per data set and a line for each of `few_architectures` that were kept."""
    # Of a model without steps there is no curve, and losses of zero have no logarithm.
    curves = {key: smoothed(model.kept["losses"]) for key, model in models.items()}
    curves = {
        key: (steps[good], means[good])
        for key, (steps, means) in curves.items()
        if np.any(good := (means > 0) & np.isfinite(means))
    }
    data = {
        d: sorted(few_architectures(here, MAX_CURVES), key=lambda c: c.mean(LOSS))
        for d, cells in by_dataset(found).items()
        if (here := [c for c in cells if (d, c.architecture) in curves])
    }
    if not data:
        return None
    figure, grid = panels(math.ceil(len(data) / 2), min(2, len(data)), width=4.4, height=2.9)
    places = [axes for line in grid for axes in line]
    for axes in places[len(data) :]:
        axes.set_axis_off()
    for axes, (dataset, cells) in zip(places, data.items(), strict=False):
        for cell, color in zip(cells, _PALETTE, strict=False):
            steps, means = curves[dataset, cell.architecture]
            axes.plot(
                steps, means, color=color, linewidth=1.2, label=cell.architecture,
                linestyle="-" if cell.is_moe else (0, (4, 1.5)),
            )  # fmt: skip
        longest = max(len(models[dataset, c.architecture].kept["losses"]) for c in cells)
        log_axis(axes, [1.0, float(longest)], "training step")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yticks([], minor=True)
        axes.set_title(heading(dataset, cells[0]))
        axes.legend(fontsize=7, frameon=False, loc="lower left")
    for line in grid:
        line[0].set_ylabel("loss of training batches")
    return figure


def smoothed(losses: NDArray[np.float32]) -> tuple[Array, Array]:
    """Mean step and mean loss of at most 120 windows, which are of equal width in the logarithm of the step."""
    steps = len(losses)
    edges = np.unique(np.round(np.geomspace(1, steps + 1, _POINTS + 1)).astype(np.int64)) - 1
    counts = np.diff(edges)
    means = np.add.reduceat(losses.astype(np.float64), edges[:-1]) / counts
    return edges[:-1] + (counts + 1) / 2, means


def chosen(
    found: Sequence[Cell], compared: Sequence[Comparison], models: Mapping[tuple[str, str], Model]
) -> dict[str, list[Cell]]:
    """The models to map on each of the first data sets: the best MoE, and the dense it is compared with.

    The MoE is the one of lowest loss that has a dense model of equal width, else of lowest loss; the dense are those of
    equal width and of equal FLOPs, or the best, if there is none.
    """
    maps: dict[str, list[Cell]] = {}
    for dataset, cells in by_dataset(found).items():
        known = [c for c in cells if (m := models.get((dataset, c.architecture))) and "weight" in m.kept]
        matched = [c for c in compared if c.matched_by in (EQUAL_WIDTH, EQUAL_FLOPS) and c.moe in known]
        pairs = [c for c in matched if c.dense in known]
        widths = [c.moe for c in pairs if c.matched_by == EQUAL_WIDTH]
        best = min(widths or [c for c in known if c.is_moe], key=lambda c: c.mean(LOSS), default=None)
        dense = [
            c.dense for kind in (EQUAL_WIDTH, EQUAL_FLOPS) for c in pairs if c.matched_by == kind and c.moe is best
        ]
        others = dense or sorted((c for c in known if not c.is_moe), key=lambda c: c.mean(LOSS))[:1]
        members = list(dict.fromkeys(c.architecture for c in [*others, *([best] if best else [])]))
        if members and len(maps) < MAX_MAPPED_DATASETS:
            maps[dataset] = [next(c for c in known if c.architecture == name) for name in members]
    return maps


def maps(cells: Sequence[Cell], models: Mapping[tuple[str, str], Model]) -> Figure:
    """A row per model: its weights, and the interference between features in its most used experts."""
    experts = max(min(EXPERTS, int(str(c.value("n_experts"))) + bool(c.value("shared_hidden"))) for c in cells)
    figure, grid = panels(len(cells), 1 + experts, width=2.1, height=2.1)
    for line, cell in zip(grid, cells, strict=True):
        row, kept = models[cell.dataset, cell.architecture]
        usage = row.get("usage")
        experts_of = _experts(kept, usage if isinstance(usage, list) else None)
        stacked = np.concatenate([encoder.T for _, encoder, _ in experts_of])
        shown = _largest(stacked)
        _image(line[0], stacked[:, shown])
        line[0].set_ylabel("hidden dimension")
        line[0].set_title(cell.architecture.replace(", ", ",\n", 1), color=MOE if cell.is_moe else DENSE)
        for edge in np.cumsum([encoder.shape[1] for _, encoder, _ in experts_of])[:-1]:
            line[0].axhline(edge - 0.5, color=MUTED, linewidth=0.5)
        product = "D Wᵀ" if "decoder" in kept else "W Wᵀ"
        for axes in line[1 + len(experts_of) :]:
            axes.set_axis_off()
        for axes, (name, encoder, decoder) in zip(line[1:], experts_of, strict=False):
            _image(axes, decoder[shown] @ encoder[shown].T)
            axes.set_title(f"{name}: {product}" if len(experts_of) > 1 else product, fontweight="normal")
        line[0].set_xlabel("feature")
        line[1].set_xlabel("feature j")
        line[1].set_ylabel("feature i")
    return figure


def _experts(kept: Kept, usage: Sequence[float] | None) -> list[tuple[str, Array, Array]]:
    """Name, encoder and decoder (n, m) of each expert, most used first, a shared one before all."""
    weight = kept["weight"].astype(np.float64)
    decoder = kept.get("decoder", kept["weight"]).astype(np.float64)
    order = np.argsort(-np.asarray(usage), kind="stable") if usage and len(usage) == len(weight) else range(len(weight))
    found = [(f"expert {place}", weight[e], decoder[e]) for place, e in enumerate(order, 1)]
    if "shared_weight" in kept:
        shared = kept["shared_weight"].astype(np.float64)
        found.insert(0, ("shared", shared, kept.get("shared_decoder", kept["shared_weight"]).astype(np.float64)))
    return found


def _largest(stacked: Array) -> NDArray[np.intp]:
    """Indices, ascending, of the features (columns) that are shown."""
    norms = np.linalg.norm(stacked, axis=0)
    return np.sort(np.argsort(-norms, kind="stable")[:MAX_FEATURES])


def _image(axes: Axes, values: Array) -> None:
    """Signed values as blue and orange whose opacity is the size: on a light page as on a dark one zero is the page."""
    top = float(np.abs(values).max()) or 1.0
    image = np.empty((*values.shape, 4))
    image[..., :3] = np.where(values[..., None] > 0, to_rgb(_POSITIVE), to_rgb(_NEGATIVE))
    image[..., 3] = np.abs(values) / top
    axes.imshow(image, aspect="auto", interpolation="none")
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(True)


_POSITIVE, _NEGATIVE = "#2f86d0", "#e06a10"
