"""The sections of ``report.html`` other than its figures, each from the rows and nothing else."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

from moesaic.bench.analysis import (
    CONFIDENCE,
    DIMENSIONALITY,
    EQUAL_FLOPS,
    EQUAL_WIDTH,
    KINDS,
    LOSS,
    Cell,
    Comparison,
    chosen_rates,
    dataset_title,
    labelled,
    number,
    on_front,
)
from moesaic.bench.plan import Row
from moesaic.bench.report_page import Column, escape, table
from moesaic.bench.spec_match import MATCHES
from moesaic.bench.spec_toml import spec_text
from moesaic.bench.store import SPEC_FILE
from moesaic.bench.words import interval, si

SLOWEST = 8
"""Most lines of the table of slowest runs."""
MAX_FAILED = 100
"""Most lines of the table of failed runs."""

_NOTES = {
    EQUAL_WIDTH: "Every hidden unit counts, active or not.",
    EQUAL_FLOPS: "Encode + router + decode, forward + backward, per sample. The dense width is an integer: the ratio "
    "says how near.",
    MATCHES["active_width"]: "The hidden units that compute for one sample.",
    MATCHES["parameters"]: "Encoders, decoders, biases and router.",
    MATCHES["bytes"]: "Counted from shapes, of training in batches, optimiser included.",
    MATCHES["wall"]: "Seconds of a training step, timed in turn before the sweep; environment.json has them.",
}


def words_section(words: str) -> str:
    """The paragraphs in plain words, a line each, their comparisons in bold; nothing where there are none."""
    if not words:
        return ""
    text = escape(words)
    for phrase in (f"At {kind}" for kind in KINDS):
        text = text.replace(phrase, f"<b>{phrase}</b>")
    paragraphs = "\n".join(f'<p class="words">{line}</p>' for line in text.splitlines())
    return f"<h2>In plain words</h2>{paragraphs}"


def summary_line(rows: Sequence[Row], environment: Mapping[str, object]) -> str:
    """How many runs, how long, where and when."""
    ok = sum(r.get("status") == "ok" for r in rows)
    seconds = math.fsum(number(r, "wall_s") or 0.0 for r in rows)
    tuned = sum(r.get("stage") == "tune" for r in rows)
    parts = [f"{ok} models trained"]
    if tuned:
        parts.append(f"{tuned} of them only to choose learning rates")
    parts.append(f"{len(rows) - ok} failed; {seconds:.0f} s of training and measuring")
    where = _machines(environment)
    text = ", ".join(parts) + (f" on {where}" if where else "") + "."
    if environment.get("started"):
        text += f" Started {str(environment['started'])[:19].replace('T', ' ')} UTC."
    if environment.get("quick"):
        text += " This is --quick: fewer points, seeds or steps than the full run has, too few for its conclusions."
    return text


def _machines(environment: Mapping[str, object]) -> str:
    """The GPU or processor of the driver, or of the nodes of the cluster that trained; "" where unknown."""
    cuda, nodes = environment.get("device") == "cuda", _nodes(environment)

    def processor(of: Mapping[str, object]) -> str:
        gpus = of.get("gpus")
        return str(gpus[0] if cuda and isinstance(gpus, list) and gpus else of.get("cpu") or "")

    if not nodes:
        return processor(environment)
    kinds = Counter(processor(node) for node in nodes)
    named = ", ".join(f"{kind} ({count})" if len(kinds) > 1 else kind for kind, count in kinds.items())
    return f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}: {named}"


def _nodes(environment: Mapping[str, object]) -> list[Mapping[str, object]]:
    """What the Ray engine noted of each node."""
    engine = environment.get("engine")
    nodes = engine.get("nodes") if isinstance(engine, Mapping) else None
    return [node for node in nodes if isinstance(node, Mapping)] if isinstance(nodes, list) else []


def _alike(nodes: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Nodes that differ in their name alone as one."""
    hosts: dict[str, list[object]] = {}
    for node in nodes:
        rest = {name: value for name, value in node.items() if name != "host"}
        hosts.setdefault(json.dumps(rest), []).append(node.get("host"))
    return {str(n): {"hosts": names, **json.loads(rest)} for n, (rest, names) in enumerate(hosts.items(), 1)}


def published_section(record: Mapping[str, Any]) -> str:
    """The table and the remarks of ``reproduction.json``: what was found next to what is published."""
    columns = [
        Column("quantity", "text"), Column("ours"), Column("published"), Column("difference"), Column("allowed"),
        Column("", "text"),
    ]  # fmt: skip
    lines = [
        (
            check["quantity"], _decimals(check["ours"], "nan"), _decimals(check["published"], "not available"),
            _decimals(check["difference"], "-"), check["allowed"] or "-",
            {True: "ok", False: "OUTSIDE", None: ""}[check["passed"]],
        )
        for check in record["checks"]
    ]  # fmt: skip
    verdict = "Reproduced: every judged line is within its allowance." if record["passed"] else "Not reproduced."
    notes = "".join(f"<li>{escape(note)}</li>\n" for note in record["notes"])
    body = table(columns, lines) + (f"<ul>{notes}</ul>" if notes else "")
    return f"<h2>Against the published numbers</h2><p>{verdict}</p>{body}"


def _decimals(value: float | None, missing: str) -> str:
    """Four decimals, or three digits of a smaller number; ``missing`` for null."""
    if value is None:
        return missing
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4f}"


def comparison_section(compared: Sequence[Comparison]) -> str:
    """A table for each way of matching an MoE with a dense model."""
    columns = [
        Column("data", "text"), Column("MoE", "text"), Column("dense", "text"), Column("unexplained variance, MoE"),
        Column("dense"), Column("difference"), Column("lower loss", "text"), Column("mean D_i, difference"),
        Column("less superposed", "text"), Column("FLOPs MoE / dense"),
    ]  # fmt: skip
    parts = []
    for kind in KINDS:
        lines = [
            (
                c.moe.dataset, c.moe.architecture, c.dense.architecture, interval(c.moe.estimate(LOSS), 4),
                interval(c.dense.estimate(LOSS), 4), interval(c.loss, 4, signed=True), c.winner,
                interval(c.dimensionality, signed=True), c.less_superposed,
                f"{c.moe.mean('active_flops') / c.dense.mean('active_flops'):.2f}",
            )
            for c in compared
            if c.matched_by == kind
        ]  # fmt: skip
        if lines:
            note = f"{_NOTES[kind]} Differences are MoE minus dense, paired by seed."
            parts.append(f"<h2>MoE against dense at {escape(kind)}</h2><p>{escape(note)}</p>{table(columns, lines)}")
    return "\n".join(parts)


def rates_section(rows: Sequence[Row]) -> str:
    """How learning rates were chosen and which; nothing where nothing was tuned."""
    chosen = chosen_rates(rows)
    if not chosen:
        return ""
    datasets = list(dict.fromkeys(d for d, _ in chosen))
    names = list(dict.fromkeys(a for _, a in chosen))
    edges = sum(rate.at_edge for rate in chosen.values())
    grid = max((rate.grid for rate in chosen.values()), key=len)
    tuning = [r for r in rows if r.get("stage") == "tune"]
    seeds = sorted({int(number(r, "seed") or 0) for r in tuning})
    note = (
        f"From the grid {', '.join(f'{lr:g}' for lr in grid)}, for each architecture on each data set: the lowest "
        f"held-out "
        f"unexplained variance after {tuning[0].get('steps')} steps on seed {', '.join(map(str, seeds))}, which no "
        f"result "
        "uses. Dense and MoE get the same number of trials. Short runs favour larger rates than long ones. "
    )
    note += (
        f"In {edges} of {len(chosen)} cases (*) the best rate is the first or last of the grid: a better one may "
        f"lie outside."
        if edges
        else "No best rate is the first or last of the grid."
    )

    def entry(dataset: str, name: str) -> str:
        rate = chosen.get((dataset, name))
        return "" if rate is None else f"{rate.lr:g}{' *' if rate.at_edge else ''}"

    columns = [Column("architecture", "text"), *map(Column, datasets)]
    body = table(columns, [(name, *(entry(d, name) for d in datasets)) for name in names])
    return f"<h2>Learning rates</h2><p>{escape(note)}</p>{body}"


def results_section(found: Sequence[Cell]) -> str:
    """Every architecture on every data set: mean and interval of the main columns."""
    if not found:
        return ""
    front = on_front(found)
    metrics = (
        ("loss", 4), (LOSS, 4), (DIMENSIONALITY, 3), ("represented_share", 2), ("features_per_dimension", 2),
        ("features_per_dimension_folded", 2), ("dead_features", 1),
    )  # fmt: skip
    columns = [
        Column("data", "text"), Column("architecture", "text"), Column("seeds"), Column("lr"), Column("active FLOPs"),
        Column("total width"), Column("loss"), Column("unexplained variance"), Column("mean D_i"),
        Column("represented"), Column("features/dim"), Column("features/dim, folded"), Column("dead features"),
        Column("effective experts"), Column("front", "text"),
    ]  # fmt: skip
    lines = [
        (
            c.dataset, c.architecture, len(c.rows),
            *(_plain(c, name) for name in ("lr", "active_flops", "total_width")),
            *(interval(c.estimate(name), digits) for name, digits in metrics),
            interval(c.estimate("effective_experts"), 1) if c.is_moe else "", "yes" if c in front else "",
        )
        for c in found
    ]  # fmt: skip
    note = (
        f"Mean ± half-width of the {100 * CONFIDENCE:.0f} % t-interval over seeds; n/a where undefined or not measured."
    )
    return f"<h2>Results</h2><p>{note}</p>{table(columns, lines)}"


def _plain(cell: Cell, key: str) -> str:
    value = cell.mean(key)
    return si(value) if math.isfinite(value) else "n/a"


def failed_section(rows: Sequence[Row]) -> str:
    """The runs without a result, and why."""
    if all(r.get("status") == "ok" for r in rows):
        return "<h2>Failed runs</h2><p>None.</p>"
    failed = [r for r in labelled(rows) if r.get("status") != "ok"]
    columns = [Column(c, "text") for c in ("stage", "data", "architecture", "lr", "seed", "run")]
    lines = [
        (
            r.get("stage") or "", r["dataset"], r["architecture"], r.get("lr"), r.get("seed"),
            str(r.get("run_key"))[:12], r.get("error"),
        )
        for r in failed[:MAX_FAILED]
    ]  # fmt: skip
    body = table([*columns, Column("reason", "long")], lines)
    shown = f" The first {MAX_FAILED}:" if len(failed) > MAX_FAILED else ""
    return f"<h2>Failed runs</h2><p>{len(failed)} of {len(rows)}; they enter no mean above.{shown}</p>{body}"


def slowest_section(rows: Sequence[Row]) -> str:
    """Seconds by architecture, because models of one shape train as one stack and share its wall time equally."""
    seconds: dict[tuple[object, object], list[float]] = {}
    for row in labelled(rows):
        if (wall := number(row, "wall_s")) is not None:
            seconds.setdefault((row["architecture"], row.get("steps")), []).append(wall)
    if not seconds:
        return ""
    slowest = sorted(seconds.items(), key=lambda item: -math.fsum(item[1]) / len(item[1]))[:SLOWEST]
    columns = [
        Column("architecture", "text"),
        Column("steps"),
        Column("models"),
        Column("s per model"),
        Column("s in all"),
    ]
    lines = [(n, steps, len(v), f"{math.fsum(v) / len(v):.3f}", f"{math.fsum(v):.1f}") for (n, steps), v in slowest]
    note = "Models of one shape train together; each is given its equal part of the wall time."
    return f"<h2>Slowest runs</h2><p>{note}</p>{table(columns, lines)}"


_DEFINITIONS = (
    (
        "Unexplained variance",
        "held-out squared error divided by the variance of the data, both weighted by importance; 0 is perfect, 1 "
        "is no "
        "better than the mean. All models on a data set are judged on one held-out batch; equal seeds see equal "
        "samples.",
    ),
    (
        "Active FLOPs",
        "matrix products that the routed experts, the router and a shared expert need for one sample, encoding all "
        "features, forward and backward; 2 per multiply-add. They say nothing of seconds.",
    ),
    (
        "D_i",
        "share of a hidden dimension that feature i has to itself in an expert, ‖W_i‖² / Σ_j (Ŵ_i·W_j)²; its mean "
        "is over "
        "the occurrences of represented features, in the experts they were routed to. 1: no superposition; 1/2: "
        "antipodal "
        "pairs. A feature is represented where its squared norm, with the gate folded in, exceeds 1/2.",
    ),
    (
        "Features per dimension",
        "‖W‖²/m, experts weighted by use; not comparable across gates unless the gate's weight is folded into W.",
    ),
    ("Effective experts", "exp of the entropy of the shares of assignments."),
    ("Network sparsity", "k/E, active experts over all."),
    (
        "Front",
        "no other model of the data set that was trained with equal settings (a tuned learning rate aside) has loss "
        "and active FLOPs as low and mean D_i as high (seed means, noise not considered).",
    ),
)


def definitions_section(found: Sequence[Cell]) -> str:
    """What the data sets are, and what the words of the report mean."""
    data = {c.dataset: dataset_title(c.rows[0]) for c in found}
    terms = [(name, title) for name, title in data.items() if not name.startswith(title)]
    items = "".join(f"<li><b>{escape(term)}</b>: {escape(text)}</li>\n" for term, text in (*terms, *_DEFINITIONS))
    return f"<h2>What the words mean</h2><ul>{items}</ul>"


def environment_section(environment: Mapping[str, object]) -> str:
    """The command that reproduces the folder, its spec, and the machine and versions it ran on."""
    if not environment:
        return "<h2>Environment</h2><p>environment.json is missing: machine and command are not known.</p>"
    parts = [
        "<h2>Reproduce</h2>",
        f"<pre>{escape(environment.get('command') or 'a call from Python: no command was recorded')}</pre>",
    ]
    if environment.get("spec"):
        parts.append(
            f"<p>with this spec, {SPEC_FILE} of the folder:</p><pre>{escape(_spec(environment['spec']))}</pre>"
        )
    hidden = {"command", "argv", "spec"}
    shown = {key: value for key, value in environment.items() if key not in hidden}
    engine, nodes = environment.get("engine"), _nodes(environment)
    if isinstance(engine, Mapping) and nodes:
        shown["engine"] = {**engine, "nodes": _alike(nodes)}
    lines = _flat(shown)
    parts.append(f"<h2>Environment</h2>{table([Column('key', 'text'), Column('value', 'long')], lines)}")
    return "\n".join(parts)


def _spec(spec: object) -> str:
    # What an older version or another program wrote may be no spec: it is shown as it is.
    try:
        return spec_text(cast("Mapping[str, object]", spec))
    except (TypeError, AttributeError):
        return json.dumps(spec, indent=2, ensure_ascii=False)


def _flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    flat: list[tuple[str, object]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{key}.")
        else:
            flat.append((prefix + key, "n/a" if value is None or value == [] else value))
    return flat
