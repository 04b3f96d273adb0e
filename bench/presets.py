"""The sweeps that come with moesaic, by name."""

from __future__ import annotations

from pathlib import Path

from moesaic.bench.middle_path import MIDDLE_PATH
from moesaic.bench.million import MILLION
from moesaic.bench.plan import InputError, Preset, closest
from moesaic.bench.reproduce.phase_plan import PHASE
from moesaic.bench.spec import load_spec
from moesaic.bench.tradeoff import TRADEOFF

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (TRADEOFF, PHASE, MILLION, MIDDLE_PATH)}


def find_preset(name: str) -> Preset:
    """The preset called ``name``, or the sweep of the TOML file ``name``.

    Raises:
        InputError: neither exists, or the file is no valid spec.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name.endswith(".toml") or Path(name).is_file():
        return load_spec(Path(name))
    raise InputError(
        f"sweep {name!r}: no such preset{closest(name, PRESETS)}; presets: {', '.join(PRESETS)}; or give a .toml file"
    )
