"""A spec written as TOML is read back as it was."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.bench.spec_example import EXAMPLE
from moesaic.bench.spec_toml import spec_text

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
