"""A spec written as TOML is read back as it was, and the run folder's plans the same runs."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.bench.plan import Preset, Row
from moesaic.bench.spec import SweepSpec, load_spec
from moesaic.bench.spec_example import EXAMPLE
from moesaic.bench.spec_toml import spec_text
from moesaic.bench.store import RunStore
from moesaic.bench.sweep import run_sweep

SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text()
VALUES = SCALARS | st.lists(SCALARS) | st.dictionaries(st.text(), SCALARS | st.lists(SCALARS))


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), SCALARS | st.lists(SCALARS) | st.dictionaries(st.text(), VALUES)))
def test_what_is_written_is_read_back(spec: dict[str, object]) -> None:
    assert tomllib.loads(spec_text(spec)) == spec


def test_the_example_is_read_back_and_readable() -> None:
    spec = tomllib.loads(EXAMPLE)
    text = spec_text(spec)
    assert tomllib.loads(text) == spec
    assert '[run]\nn_features = 64\nfeatures = "independent"\n' in text
    assert "feature_probability = { log = [0.03, 0.3], n = 2 }" in text


def test_what_toml_cannot_say_is_refused() -> None:
    with pytest.raises(TypeError, match="no word for a NoneType"):
        spec_text({"run": {"steps": None}})


def untrained(group: Any, **_: object) -> list[Row]:
    return [{"run_key": item.run.key} for item in group]


def test_the_command_of_a_call_from_python_plans_the_same_runs(tmp_path: Path) -> None:
    spec, out = SweepSpec(run={"steps": 4}, grid={"n_hidden": [1, 2]}, seeds=2), tmp_path / "the out"
    run_sweep(spec, out, device="cpu", seeds=3, progress=False, trainer=untrained)
    command = shlex.split(str((RunStore(out).environment() or {})["command"]))
    assert command[:3] == ["moesaic", "sweep", str(out / "spec.toml")]
    assert command[command.index("--seeds") + 1] == "3"
    again = load_spec(Path(command[2])).stages(False, 3)[0]([])
    assert [item.run.key for item in again] == [row["run_key"] for row in RunStore(out).rows()]
    own = Preset("mine", "of a program", spec.preset().stages)
    run_sweep(own, tmp_path / "own", device="cpu", progress=False, trainer=untrained)
    assert (RunStore(tmp_path / "own").environment() or {})["command"] is None
