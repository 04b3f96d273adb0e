"""What a reproduction is made of and returns: trainings, checks against published numbers, and their table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.bench.plan import Row
    from moesaic.bench.sweep import Trainer
    from moesaic.moe import Run, TrainResult


@dataclass(frozen=True)
class Check:
    """One line of the table; build it with `within`, `relative`, `above` or `shown`.

    Args:
        quantity: what is compared, in words.
        ours: the value found here.
        published: the value it is compared with; None prints "not available".
        allowed: the stated allowance in words; "" where the line is shown, not judged.
        passed: None where the line is shown, not judged.
    """

    quantity: str
    ours: float
    published: float | None
    allowed: str
    passed: bool | None

    @property
    def difference(self) -> float | None:
        """Ours minus published; None where nothing is published."""
        return None if self.published is None else self.ours - self.published


def within(quantity: str, ours: float, published: float, allowance: float) -> Check:
    """Judge |ours − published| ≤ allowance; NaN does not pass."""
    return Check(quantity, ours, published, f"±{allowance:g}", abs(ours - published) <= allowance)


def relative(quantity: str, ours: float, published: float, share: float) -> Check:
    """Judge |ours − published| ≤ share · |published|; NaN does not pass."""
    return Check(quantity, ours, published, f"±{share:.0%}", abs(ours - published) <= share * abs(published))


def above(quantity: str, ours: float, limit: float) -> Check:
    """Judge ours > limit where no number is published; NaN does not pass."""
    return Check(quantity, ours, None, f"> {limit:g}", ours > limit)


def below(quantity: str, ours: float, limit: float) -> Check:
    """Judge ours < limit where no number is published; NaN does not pass."""
    return Check(quantity, ours, None, f"< {limit:g}", ours < limit)


def shown(quantity: str, ours: float, published: float | None = None) -> Check:
    """Show a value without judging it."""
    return Check(quantity, ours, published, "", None)


def _number(value: float | None, missing: str) -> str:
    if value is None:
        return missing
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4f}"


def format_table(checks: Sequence[Check]) -> str:
    """Lay out the checks as plain text: quantity, ours, published, difference, allowed, verdict."""
    lines = [("quantity", "ours", "published", "difference", "allowed", "")]
    for check in checks:
        verdict = {True: "ok", False: "OUTSIDE", None: ""}[check.passed]
        numbers = (_number(check.ours, ""), _number(check.published, "not available"), _number(check.difference, "-"))
        lines.append((check.quantity, *numbers, check.allowed or "-", verdict))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    rows = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, 5)), line[5]]
        rows.append("  ".join(cells).rstrip())
    return "\n".join(rows)


@dataclass(frozen=True)
class Outcome:
    """What a reproduction concludes from its rows: the checks, the figure files, and remarks for the reader."""

    checks: list[Check]
    figures: list[Path]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reproduction:
    """A published result that can be trained again and compared.

    Args:
        name: what the user types.
        description: one sentence.
        seeds: trainings of each configuration in the full run, from different seeds.
        quick_seeds: the same for ``quick``.
        max_models: most models trained as one stack; a resumed reproduction repeats at most that many.
        plan: (quick, seeds) → the trainings.
        columns: (trained stack, its runs) → extra columns of each run's row.
        conclude: (rows without failed ones, targets, quick, figures folder) → outcome.
        trainer: trains and measures a group of models that are no toy autoencoders, by PyTorch; ``columns`` is then
            not asked, and the rows are labelled with the reproduction's name as their ``task``.
    """

    name: str
    description: str
    seeds: int
    quick_seeds: int
    max_models: int
    plan: Callable[[bool, int], list[Run]]
    columns: Callable[[TrainResult, Sequence[Run]], list[dict[str, object]]]
    conclude: Callable[[list[Row], dict[str, Any], bool, Path], Outcome]
    trainer: Trainer | None = None


def load_targets() -> dict[str, Any]:
    """Read the published numbers and allowances that ship with the package (``targets.json``)."""
    text = resources.files(__package__).joinpath("targets.json").read_text(encoding="utf-8")
    targets: dict[str, Any] = json.loads(text)
    return targets


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
