"""A sweep as a TOML file or a `SweepSpec`: what every run has, what varies, checked in full before training.

    seeds = 3                                   # 0, 1, 2; or a list
    where = ["top_k <= n_experts"]              # only such runs
    [run]                                       # one value for all runs
    n_features = 64
    [grid]                                      # every combination
    n_experts = [1, 4]
    feature_probability = { log = [0.01, 1.0], n = 5 }
    [zip]                                       # lists of one length, walked together
    n_hidden = [4, 16]
    lr = [0.01, 0.003]
    [match]                                     # a dense run for every mixture
    to = ["active_flops", "parameters"]

The keys are the field names of `ToyConfig`, `FeatureConfig` and `TrainConfig`; what is not given has its default.
`moesaic.bench.spec_values` says what a list may be, `spec_where` what a condition, `spec_match` what a match.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.bench.plan import InputError, PlannedRun, Preset, Row, Stage, closest, unique
from moesaic.bench.spec_lines import line_of
from moesaic.bench.spec_match import match_names, wall_width, with_dense
from moesaic.bench.spec_values import field_values
from moesaic.bench.spec_where import Condition, condition

if TYPE_CHECKING:
    from moesaic.moe.config import Run

SECTIONS = ("seeds", "where", "run", "grid", "zip", "match")
_AT_THE_TOP = ("seeds", "where")


class SpecError(InputError):
    """A spec that cannot be run; ``table`` and ``key`` say where in the file it is."""

    def __init__(self, message: str, table: str = "", key: str = "") -> None:
        super().__init__(message)
        self.table, self.key = table, key


@dataclass(frozen=True)
class SweepSpec:
    """A sweep said in Python, for `run_sweep`; the same words as in a TOML file.

    Args:
        run: one value per field for all runs.
        grid: values per field, in every combination: a list, or a range such as ``{"log": [1e-4, 1e-1], "n": 7}``.
        zip: values per field, walked together.
        seeds: how many, or which; None for the field ``seed``.
        match: quantities in which every mixture gets a dense run of its size, see `moesaic.bench.spec_match`.
        where: conditions that the runs have to meet, such as ``"top_k <= n_experts"``.
        name: what the run folder calls it.

    Example:
        >>> spec = SweepSpec(run={"steps": 100}, grid={"n_experts": [2, 4]}, seeds=3, match=["active_flops"])
        >>> run_sweep(spec, "runs/mine").table().aggregate("n_experts, avg(loss)")
    """

    run: Mapping[str, object] = field(default_factory=dict)
    grid: Mapping[str, object] = field(default_factory=dict)
    zip: Mapping[str, object] = field(default_factory=dict)
    seeds: int | Sequence[int] | None = None
    match: str | Sequence[str] = ()
    where: str | Sequence[str] = ()
    name: str = "spec"

    def mapping(self) -> dict[str, object]:
        """What a TOML file that says the same is parsed to."""
        given = {
            "seeds": self.seeds, "where": self.where, "run": self.run, "grid": self.grid, "zip": self.zip,
            "match": {"to": self.match} if self.match else {},
        }  # fmt: skip
        return {name: _as_toml(value) for name, value in given.items() if value is not None and not _empty(value)}

    def preset(self) -> SpecPreset:
        """What `run_sweep` runs; every run has been checked.

        Raises:
            InputError: as `load_spec`, without a file and a line.
        """
        return spec_preset(self.mapping(), self.name)

    def planned(self) -> list[PlannedRun]:
        """Every run, without the dense ones of ``match=["wall"]``, which have to be measured first."""
        return planned_runs(self.mapping())


@dataclass(frozen=True)
class SpecPreset(Preset):
    """The one-stage preset of a spec.

    Args:
        mixtures: ``mixtures(quick, seeds)``: the runs whose step has to be measured before all of the plan is known.
        calibrated: the same preset with what `moesaic.bench.rates.calibrate_wall` measured.
    """

    mixtures: Callable[[bool, int | None], list[Run]] = lambda quick, seeds: []
    calibrated: Callable[[Mapping[str, object]], SpecPreset] | None = None


def load_spec(path: Path) -> SpecPreset:
    """The one-stage preset that the TOML file ``path`` describes; every run of it has been checked.

    Raises:
        InputError: no such file, not TOML, an unknown key, or a value no run can have - naming the line, key and value,
            and what is allowed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        spec = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: {error}") from error
    try:
        return spec_preset(spec, name=Path(path).stem)
    except SpecError as error:
        line = line_of(text, error.table, error.key) if error.table or error.key else None
        raise InputError(f"{path}{'' if line is None else f', line {line}'}: {error}") from error


def spec_preset(
    spec: Mapping[str, object], name: str = "spec", calibration: Mapping[str, object] | None = None
) -> SpecPreset:
    """The one-stage preset of a parsed spec; ``--quick`` keeps the ends of every list and the first seed."""

    @lru_cache(maxsize=2)
    def planned(quick: bool, seeds: int | None) -> list[PlannedRun]:
        return planned_runs(spec, quick=quick, seeds=seeds, calibration=calibration)

    def stages(quick: bool, seeds: int | None) -> list[Stage]:
        runs = planned(quick, seeds)

        def main(_: list[Row]) -> list[PlannedRun]:
            return list(runs)

        return [main]

    def mixtures(quick: bool, seeds: int | None) -> list[Run]:
        if calibration is not None or "wall" not in _matches(spec):
            return []
        return [item.run for item in planned(quick, seeds) if item.run.toy.n_experts > 1]

    def calibrated(measured: Mapping[str, object]) -> SpecPreset:
        return spec_preset(spec, name, measured)

    planned(False, None)
    return SpecPreset(name, f"the sweep of {name}.toml", stages, dict(spec), mixtures, calibrated)


def planned_runs(
    spec: Mapping[str, object],
    *,
    quick: bool = False,
    seeds: int | None = None,
    calibration: Mapping[str, object] | None = None,
) -> list[PlannedRun]:
    """The runs of a parsed spec: grid points in the order of the file, zip points within them, seeds innermost.

    The dense runs of ``[match]`` come last; ``where`` does not ask about them.

    Args:
        spec: the parsed TOML.
        quick: keep the first and last value of every list and the first seed.
        seeds: use 0 … seeds-1 in place of the spec's own seeds.
        calibration: measured steps for the match ``wall``; None leaves its dense runs out.

    Raises:
        InputError: as `load_spec`.
    """
    for section in spec:
        if section not in SECTIONS:
            raise SpecError(_unknown(section, spec[section], SECTIONS), *_place(spec, section))
    fixed, grid, zipped = (_table(spec, section) for section in ("run", "grid", "zip"))
    _check_keys({"run": fixed, "grid": grid, "zip": zipped})
    lists = {
        section: {key: _values(section, key, value) for key, value in table.items()}
        for section, table in (("grid", grid), ("zip", zipped))
    }
    lengths = {key: len(values) for key, values in lists["zip"].items()}
    if len(set(lengths.values())) > 1:
        raise SpecError(f"zip: the lists must have one length, got {_pairs(lengths)}", "zip")
    seed_list = _seeds(spec, seeds)
    if quick:
        lists = {section: {k: _ends(v) for k, v in table.items()} for section, table in lists.items()}
        seed_list = seed_list[:1]
    if seed_list and "seed" in {**fixed, **grid, **zipped}:
        raise SpecError("seed: give it as a field of the runs or give seeds, not both", "", "seeds")
    to = _matches(spec)
    labels = {"stage": "main"}
    planned = [PlannedRun(run, labels) for run in _runs(fixed, lists, seed_list, _conditions(spec))]
    if not planned:
        raise SpecError(f"where = {spec['where']!r}: leaves no run", "", "where")
    planned = unique(planned)
    if to and not quick and all(item.run.toy.n_experts == 1 for item in planned):
        raise SpecError("match: no run has n_experts > 1, so there is nothing to match", "match", "to")
    return with_dense(planned, to, None if calibration is None else wall_width(calibration)) if to else planned


def _runs(
    fixed: Mapping[str, object], lists: Mapping[str, Mapping[str, list[object]]], seeds: Sequence[int],
    conditions: Sequence[Condition],
) -> Iterator[Run]:  # fmt: skip
    """Every run that the conditions let through, in order."""
    from moesaic.moe.config import Run

    grid, zipped = lists["grid"], lists["zip"]
    names = [*grid, *zipped]
    defaults = Run().flat()
    # Parts are shared between the runs that agree in them: 100,000 runs have few architectures and few rates.
    parts: list[tuple[type, set[str], list[int], dict[tuple[int, ...], Any]]] = [
        (kind, taken, [i for i, name in enumerate(names) if name in taken], {})
        for kind, taken in _parts_of_a_run().items()
    ]
    walked = range(len(next(iter(zipped.values())))) if zipped else range(1)
    for place in itertools.product(*map(range, map(len, grid.values())), walked):
        # The place in each list: of the grid's their own, of the zip's the common one.
        places = (*place[:-1], *(place[-1] for _ in zipped))
        varied = {name: (grid.get(name) or zipped[name])[i] for name, i in zip(names, places, strict=True)}
        values = {**fixed, **varied}
        given: list[Any] = list(seeds) or [values.get("seed", 0)]
        if conditions:
            given = [s for s in given if all(holds({**defaults, **values, "seed": s}) for holds in conditions)]
        if not given:
            continue
        try:
            made = []
            for kind, taken, varying, cache in parts:
                at = tuple(places[i] for i in varying)
                if at not in cache:
                    cache[at] = kind(**{name: value for name, value in values.items() if name in taken})
                made.append(cache[at])
            toy, features, training = made
            for seed in given:
                yield Run(toy, features, training, seed)
        except ValueError as error:
            where = f" (in the run with {_pairs(varied)})" if varied else ""
            key = found.group() if (found := re.match(r"\w+(?==)", str(error))) else ""
            table = next((t for t, keys in {"run": fixed, **lists}.items() if key in keys), "")
            raise SpecError(f"{error}{where}", table, key if table else "") from error


def _conditions(spec: Mapping[str, object]) -> list[Condition]:
    value = spec.get("where", [])
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise SpecError(f'where = {value!r}: must be a list of conditions, such as ["top_k <= n_experts"]', "", "where")
    names = list(_kinds())
    try:
        return [_placed(condition(text, names)) for text in value]
    except InputError as error:
        raise SpecError(str(error), "", "where") from error


def _placed(holds: Condition) -> Condition:
    def placed(values: Mapping[str, object]) -> bool:
        try:
            return holds(values)
        except InputError as error:
            raise SpecError(str(error), "", "where") from error

    return placed


def _matches(spec: Mapping[str, object]) -> list[str]:
    """The names of ``match = "…"``, ``match = ["…"]`` or ``[match]`` with ``to = …``, none without a match."""
    match = spec.get("match", {})
    place = ("match", "to")
    if isinstance(match, str | list):
        match, place = {"to": match}, ("", "match")
    elif not isinstance(match, Mapping):
        raise SpecError(
            f"match = {match!r}: must be a name, a list of names, or a table [match] with to = …", "", "match"
        )
    for key in match:
        if key != "to":
            raise SpecError(f"[match] {_unknown(key, match[key], ['to'])}", "match", key)
    if not match:
        return []
    try:
        return match_names(match["to"])
    except InputError as error:
        raise SpecError(str(error), *place) from error


def _parts_of_a_run() -> dict[type, set[str]]:
    from dataclasses import fields

    from moesaic.moe.config import FeatureConfig, ToyConfig, TrainConfig

    return {kind: {f.name for f in fields(kind)} for kind in (ToyConfig, FeatureConfig, TrainConfig)}


def _kinds() -> dict[str, type]:
    """Type of every field, by its default."""
    from moesaic.moe.config import Run

    return {name: type(value) for name, value in Run().flat().items()}


def _unknown(key: str, value: object, allowed: Iterable[str]) -> str:
    names = list(allowed)
    return f"unknown key {key!r} (= {value!r}){closest(key, names)}; allowed: {', '.join(names)}"


def _place(spec: Mapping[str, object], section: str) -> tuple[str, str]:
    return (section, "") if isinstance(spec[section], dict) else ("", section)


def _table(spec: Mapping[str, object], section: str) -> dict[str, object]:
    table = spec.get(section, {})
    if not isinstance(table, dict):
        raise SpecError(
            f"{section} = {table!r}: must be a table, [{section}] with one key = value per line", "", section
        )
    return table


def _check_keys(tables: Mapping[str, Mapping[str, object]]) -> None:
    names = list(_kinds())
    owner: dict[str, str] = {}
    for section, table in tables.items():
        for key, value in table.items():
            if key in _AT_THE_TOP:
                raise SpecError(
                    f"[{section}] {key} = {value!r}: belongs above the first [table] of the file", section, key
                )
            if key not in names:
                raise SpecError(f"[{section}] {_unknown(key, value, names)}", section, key)
            if key in owner:
                raise SpecError(f"{key} is given in [{owner[key]}] and in [{section}]; give it once", section, key)
            owner[key] = section


def _values(section: str, key: str, value: object) -> list[object]:
    try:
        return field_values(f"{section}.{key}", value, _kinds()[key], repeats=section == "zip")
    except InputError as error:
        raise SpecError(str(error), section, key) from error


def _seeds(spec: Mapping[str, object], override: int | None) -> list[int]:
    value = spec.get("seeds") if override is None else override
    if value is None:
        return []
    if isinstance(value, list):
        whole = [s for s in value if isinstance(s, int) and not isinstance(s, bool) and s >= 0]
        if whole and len(whole) == len(value) == len(set(whole)):
            return whole
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return list(range(value))
    raise SpecError(
        f"seeds = {value!r}: must be an integer >= 1 (seeds 0 … N-1) or a list of different integers >= 0", "", "seeds"
    )


def _ends(values: list[object]) -> list[object]:
    return values if len(values) < 3 else [values[0], values[-1]]


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} = {value!r}" for key, value in values.items())


def _empty(value: object) -> bool:
    return isinstance(value, Mapping | Sequence) and not value


def _as_toml(value: object) -> object:
    """``value`` with ranges, tuples, arrays and numbers of NumPy as the lists and numbers of a parsed file."""
    if isinstance(value, Mapping):
        return {str(key): _as_toml(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_as_toml(item) for item in value]
    return value
