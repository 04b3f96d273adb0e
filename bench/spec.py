"""A sweep as a TOML file: fixed values, grids, zips and seeds over a run's fields, checked in full before training.

    seeds = 3                    # 0, 1, 2; or a list
    [run]                        # one value for all runs
    n_features = 64
    [grid]                       # every combination
    n_experts = [1, 4]
    feature_probability = [0.03, 0.3]
    [zip]                        # lists of one length, walked together
    n_hidden = [4, 16]
    lr = [0.01, 0.003]

The keys are the field names of `ToyConfig`, `FeatureConfig` and `TrainConfig`; what is not given has its default.
"""

from __future__ import annotations

import difflib
import itertools
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from moesaic.bench.plan import InputError, PlannedRun, Preset, Row, Stage, unique

SECTIONS = ("seeds", "run", "grid", "zip")


def load_spec(path: Path) -> Preset:
    """The one-stage preset that the TOML file ``path`` describes; every run of it has been checked.

    Raises:
        InputError: no such file, not TOML, an unknown key, or a value no run can have - naming key, value and what is
            allowed.
    """
    try:
        spec = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: {error}") from error
    try:
        return spec_preset(spec, name=Path(path).stem)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def spec_preset(spec: Mapping[str, object], name: str = "spec") -> Preset:
    """The one-stage preset of a parsed spec; ``--quick`` keeps the ends of every list and the first seed."""
    planned_runs(spec)

    def stages(quick: bool, seeds: int | None) -> list[Stage]:
        planned = planned_runs(spec, quick=quick, seeds=seeds)

        def main(_: list[Row]) -> list[PlannedRun]:
            return planned

        return [main]

    return Preset(name, f"the sweep of {name}.toml", stages, dict(spec))


def planned_runs(spec: Mapping[str, object], *, quick: bool = False, seeds: int | None = None) -> list[PlannedRun]:
    """The runs of a parsed spec: grid points in the order of the file, zip points within them, seeds innermost.

    Args:
        spec: the parsed TOML.
        quick: keep the first and last value of every list and the first seed.
        seeds: use 0 … seeds-1 in place of the spec's own seeds.

    Raises:
        InputError: as `load_spec`.
    """
    from moesaic.moe.config import Run

    for section in spec:
        if section not in SECTIONS:
            raise InputError(_unknown(section, spec[section], SECTIONS))
    fixed, grid, zipped = (_table(spec, section) for section in ("run", "grid", "zip"))
    _check_keys({"run": fixed, "grid": grid, "zip": zipped})
    lists = {
        section: {key: _list(f"{section}.{key}", value) for key, value in table.items()}
        for section, table in (("grid", grid), ("zip", zipped))
    }
    lengths = {key: len(values) for key, values in lists["zip"].items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"zip: the lists must have one length, got {_pairs(lengths)}")

    seed_list = _seeds(spec, seeds)
    if quick:
        lists = {section: {k: _ends(v) for k, v in table.items()} for section, table in lists.items()}
        seed_list = seed_list[:1]
    if seed_list and "seed" in {**fixed, **grid, **zipped}:
        raise InputError("seed: give it as a field of the runs or give seeds, not both")

    planned = []
    for point in itertools.product(*lists["grid"].values()):
        for walked in zip(*lists["zip"].values(), strict=True) if lists["zip"] else [()]:
            varied = dict(zip([*lists["grid"], *lists["zip"]], [*point, *walked], strict=True))
            for seed in [{"seed": s} for s in seed_list] or [{}]:
                try:
                    run = Run.from_flat({**fixed, **varied, **seed})
                except ValueError as error:
                    where = f" (in the run with {_pairs(varied)})" if varied else ""
                    raise InputError(f"{error}{where}") from error
                planned.append(PlannedRun(run, {"stage": "main"}))
    return unique(planned)


def closest(name: str, allowed: Iterable[str]) -> str:
    """The question whether the nearest of ``allowed`` was meant, to end a message with; empty where none is near."""
    near = difflib.get_close_matches(name, list(allowed), n=1)
    return f" - did you mean {near[0]!r}?" if near else ""


def _field_names() -> list[str]:
    from moesaic.moe.config import FeatureConfig, Run, ToyConfig, TrainConfig

    return list(Run(ToyConfig(), FeatureConfig(), TrainConfig()).flat())


def _unknown(key: str, value: object, allowed: Iterable[str]) -> str:
    names = list(allowed)
    return f"unknown key {key!r} (= {value!r}){closest(key, names)}; allowed: {', '.join(names)}"


def _table(spec: Mapping[str, object], section: str) -> dict[str, object]:
    table = spec.get(section, {})
    if not isinstance(table, dict):
        raise InputError(f"{section} = {table!r}: must be a table, [{section}] with one key = value per line")
    return table


def _check_keys(tables: Mapping[str, Mapping[str, object]]) -> None:
    names = _field_names()
    owner: dict[str, str] = {}
    for section, table in tables.items():
        for key, value in table.items():
            if key not in names:
                raise InputError(f"[{section}] {_unknown(key, value, names)}")
            if key in owner:
                raise InputError(f"{key} is given in [{owner[key]}] and in [{section}]; give it once")
            owner[key] = section


def _list(name: str, value: object) -> list[object]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{name} = {value!r}: must be a list of one value or more; a single fixed value goes to [run]")
    for i, item in enumerate(value):
        if name.startswith("grid.") and item in value[:i]:
            raise InputError(f"{name} = {value!r}: {item!r} is in the list twice")
    return value


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
    raise InputError(f"seeds = {value!r}: must be an integer >= 1 (seeds 0 … N-1) or a list of different integers >= 0")


def _ends(values: list[object]) -> list[object]:
    return values if len(values) < 3 else [values[0], values[-1]]


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} = {value!r}" for key, value in values.items())
