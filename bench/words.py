"""The verdict in plain words and in numbers, generated from the paired intervals alone."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.bench.analysis import CONFIDENCE, KINDS, LOSS, Cell, Comparison, Estimate, paired


def plain_words(found: Sequence[Cell], compared: Sequence[Comparison]) -> str:
    """One paragraph: who wins in each kind of comparison, at equal total width first, and who shares dimensions less.

    A side wins where the 95 % t-interval of the loss difference, paired by seed, excludes zero; elsewhere the text says
    "not resolved". Empty where no MoE has a dense partner.
    """
    if not compared:
        return ""
    sentences = []
    for kind in KINDS:
        members = [c for c in compared if c.matched_by == kind]
        if not members:
            continue
        sentences.append(f"At {kind}, {_tally(members)}.")
        for dataset in dict.fromkeys(c.moe.dataset for c in members):
            sentences.append(_dataset_sentence(dataset, [c for c in members if c.moe.dataset == dataset]))
        sentences.append(_sharing_sentence(members))
    sentences += _frozen_sentence(compared) + _gate_sentences(found)
    seeds = sorted({c.loss.n for c in compared})
    by_chance = max(1, round((1 - CONFIDENCE) * len(compared)))
    sentences.append(
        f"Each verdict is a {100 * CONFIDENCE:.0f} % t-interval of differences paired by seed ({_range(seeds)} seeds), "
        f"read by itself: if nothing differed, about {by_chance} of the {len(compared)} would still be called."
    )
    return " ".join(sentences)


def _tally(members: Sequence[Comparison]) -> str:
    moe, dense, neither = (sum(c.winner == side for c in members) for side in ("MoE", "dense", "not resolved"))
    if len(members) in (moe, dense):
        return f"{'MoE' if moe else 'dense'} has the lower loss in {_all(members)}"
    text = f"MoE has the lower loss in {moe} of {len(members)} pairs and dense in {dense}"
    return f"{text}; {neither} {'is' if neither == 1 else 'are'} not resolved" if neither else text


def _all(members: Sequence[Comparison]) -> str:
    return f"all {len(members)} pairs" if len(members) > 1 else "the one pair"


def _dataset_sentence(dataset: str, members: Sequence[Comparison]) -> str:
    """Wins and losses, each with the numbers of its clearest case; the names of what is not resolved."""
    wins = sorted((c for c in members if c.winner == "MoE"), key=lambda c: c.loss.mean)
    losses = sorted((c for c in members if c.winner == "dense"), key=lambda c: -c.loss.mean)
    undecided = [c for c in members if c.winner == "not resolved"]
    parts = [f"MoE {verb} with {_side(side, members)}" for verb, side in (("wins", wins), ("loses", losses)) if side]
    if undecided:
        parts.append(f"not resolved: {_names(undecided)}")
    return f"On {dataset}, {'; '.join(parts)}."


def _side(side: Sequence[Comparison], members: Sequence[Comparison]) -> str:
    if len(side) == len(members) > 1:
        return f"all {len(side)}: from {_numbers(side[0])} to {_numbers(side[-1])}"
    return f"{_numbers(side[0])}, also {_names(side[1:])}" if len(side) > 1 else _numbers(side[0])


def _numbers(comparison: Comparison) -> str:
    moe, dense = (_small(c.mean(LOSS)) for c in (comparison.moe, comparison.dense))
    return f"{_name(comparison)} ({moe} against {dense} of {comparison.dense.architecture})"


def _small(value: float) -> str:
    return "<0.001" if 0 <= value < 0.001 else f"{value:.3f}"


def _names(members: Sequence[Comparison]) -> str:
    return ", ".join(_name(c) for c in members)


def _name(comparison: Comparison) -> str:
    return comparison.moe.architecture.removeprefix("MoE ")


def _sharing_sentence(members: Sequence[Comparison]) -> str:
    moe, dense, neither = (sum(c.less_superposed == side for c in members) for side in ("MoE", "dense", "not resolved"))
    if len(members) in (moe, dense):
        return f"Mean D_i is higher, so superposition lower, in {'MoE' if moe else 'dense'} in {_all(members)}."
    text = f"Mean D_i is higher, so superposition lower, in MoE in {moe} and in dense in {dense}"
    return f"{text}, not resolved in {neither}." if neither else f"{text}."


def _frozen_sentence(compared: Sequence[Comparison]) -> list[str]:
    """What a reader must know of the paper's gate: at k = 1 its weight is 1 whatever the router does."""
    cells = {c.moe.architecture: c.moe for c in compared}.values()
    frozen = [c for c in cells if c.value("gate") == "paper" and c.value("top_k") == 1 and not c.value("load_balance")]
    if not frozen:
        return []
    names = ", ".join(c.architecture.removeprefix("MoE ") for c in frozen)
    return [
        f"With the paper gate at k = 1 the router has no gradient: {names} route as they were initialised, at random."
    ]


def _gate_sentences(found: Sequence[Cell]) -> list[str]:
    """Each model of the gate slice against the grid's model with equal E, k and data, by paired loss."""
    sentences = []
    for base in (c for c in found if c.value("slice") == "grid"):
        shape = (base.dataset, base.value("n_experts"), base.value("top_k"))
        rivals = [
            c
            for c in found
            if c.value("slice") == "gates" and (c.dataset, c.value("n_experts"), c.value("top_k")) == shape
        ]
        if not rivals:
            continue
        differences = [(c, paired(c, base, LOSS)) for c in rivals]
        parts = [
            f"{word} {', '.join(_variant(c) for c in chosen)}"
            for word, chosen in (
                ("lower with", [c for c, d in differences if d.excludes_zero and d.mean < 0]),
                ("higher with", [c for c, d in differences if d.excludes_zero and d.mean > 0]),
                ("not resolved for", [c for c, d in differences if not d.excludes_zero]),
            )
            if chosen
        ]
        gate = str(base.value("gate")).replace("_", "-")
        sentences.append(
            f"On {base.dataset} with {_shape(base)}, against the {gate} gate the loss is {'; '.join(parts)}."
        )
    return sentences


def _variant(cell: Cell) -> str:
    if cell.value("shared_hidden"):
        return f"a shared expert ({cell.value('n_experts')}×{cell.value('n_hidden')} + {cell.value('shared_hidden')})"
    return str(cell.value("gate")).replace("_", "-")


def _shape(cell: Cell) -> str:
    return f"{cell.value('n_experts')} experts and k = {cell.value('top_k')}"


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def interval(value: Estimate, digits: int = 3, *, signed: bool = False) -> str:
    """``0.063 ± 0.004``; a mean alone where one seed allows no interval, ``n/a`` where nothing was measured."""
    if value.n == 0:
        return "n/a"
    mean = f"{value.mean:{'+' if signed else ''}.{digits}f}"
    return mean if value.n == 1 else f"{mean} ± {value.half_width:.{digits}f}"


def result_lines(found: Sequence[Cell], compared: Sequence[Comparison]) -> list[str]:
    """The short verdict under the terminal's table: one line per kind of comparison."""
    lines = []
    for kind in KINDS:
        members = [c for c in compared if c.matched_by == kind]
        if members:
            lines.append(f"{kind}: {_tally(members)}")
    return lines


def si(value: float) -> str:
    """Three significant digits and a decimal prefix: 12_345 → ``12.3k``."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def si_unit(value: float, unit: str) -> str:
    """The same with a unit: 12_345, ``B/s`` → ``12.3 kB/s``."""
    text = si(value)
    number = text.rstrip("PTGMk")
    return f"{number} {text[len(number) :]}{unit}"
