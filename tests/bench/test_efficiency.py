"""Factors of dense over sparse costs, their words, and the figure of the gap."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moesaic.bench.efficiency import (
    YARDSTICK,
    YARDSTICK_WORDS,
    Cost,
    Factor,
    efficiency_gap,
    factor,
    gap,
    gap_words,
    ranges,
    spread,
)

DENSE = Cost(800.0, 300.0, (2.0, 4.0, 3.0), ())
SPARSE = Cost(200.0, 600.0, (4.0, 4.0, 5.0), (1.0, 2.0, 3.0))
NAMES = ("16×4 k=1", "m=64")


def test_a_factor_is_dense_over_sparse_with_its_range_within_rounds() -> None:
    assert factor(DENSE, SPARSE, "flops") == Factor(4.0, 4.0, 4.0)
    assert factor(DENSE, SPARSE, "bytes") == Factor(0.5, 0.5, 0.5)
    assert factor(DENSE, SPARSE, "seconds") == Factor(3.0 / 4.0, 0.5, 1.0)


def test_what_one_side_does_not_know_has_no_factor() -> None:
    assert factor(DENSE, SPARSE, "joules") is None
    assert factor(Cost(), SPARSE, "flops") is None
    one = gap("equal total width", NAMES, SPARSE, DENSE)
    assert one.factors["joules"] is None
    assert "joules" not in ranges([one])
    assert spread(None) == "-"


def test_rounds_must_pair() -> None:
    with pytest.raises(ValueError, match="zip"):
        factor(Cost(seconds=(1.0, 2.0)), Cost(seconds=(1.0,)), "seconds")


def test_words_put_the_four_side_by_side_and_say_where_they_disagree() -> None:
    gaps = [gap("equal total width", NAMES, SPARSE, DENSE), gap("masked data", NAMES, SPARSE, SPARSE)]
    text = gap_words(gaps[:1], "no meter here")
    assert text.endswith("Joules were not measured: no meter here.")
    text = gap_words(gaps, "a counter stood still")
    assert "At equal total width, dense over sparse: FLOPs 4, bytes 0.5, time 0.75" in text
    assert "in 1 of 1 pairs the sparse model has no more FLOPs and yet takes longer." in text
    assert "Against masked data, dense over sparse: FLOPs 1, bytes 1, time 1, joules 1." in text
    assert text.endswith("In 1 of 2 pairs a side has no valid joules: a counter stood still.")
    assert "not measured" not in gap_words(gaps, None)


def test_the_range_of_a_measured_factor_is_shown() -> None:
    assert spread(factor(DENSE, SPARSE, "seconds")) == "0.75 [0.5-1]"
    assert spread(factor(DENSE, SPARSE, "flops")) == "4"


def test_the_figure_has_dense_at_1_and_the_yardstick_apart() -> None:
    pytest.importorskip("matplotlib")
    from moesaic.bench.plot_style import style

    gaps = [gap("equal total width", NAMES, SPARSE, DENSE), gap("equal loss", NAMES, SPARSE, DENSE)]
    with style():
        figure = efficiency_gap(gaps)
        some = efficiency_gap([*gaps, gap("equal loss", NAMES, SPARSE, SPARSE)])
    assert figure is not None
    assert [axes.get_title() or axes.get_title(loc="left") for axes in figure.axes] == [
        "At equal total width",
        "At equal loss",
    ]
    for axes in figure.axes:
        lines = [np.asarray(line.get_xdata(), dtype=float) for line in axes.get_lines()]
        upright = {float(x[0]) for x in lines if len(x) > 1 and len(set(x)) == 1}
        assert {1.0, YARDSTICK} <= upright
        low, high = axes.get_xlim()
        assert low < 0.5
        assert high > YARDSTICK
        assert axes.get_xscale() == "log"
    assert any("literature estimate, not measured" in text.get_text() for text in figure.axes[0].texts)
    key = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "joules: not measured" in key
    assert some is not None
    assert "joules, measured" in [text.get_text() for text in some.legends[0].get_texts()]
    assert efficiency_gap([]) is None


def test_unknown_flops_are_not_called_no_more() -> None:
    unknown = gap("equal loss", NAMES, Cost(seconds=(2.0,)), Cost(seconds=(1.0,)))
    assert "no more FLOPs" not in gap_words([unknown], None)


def test_no_ratio_of_a_measurement_to_the_yardstick_is_printed() -> None:
    assert math.log10(YARDSTICK) == 4
    assert "Nothing here was measured on either, and no figure of ours is divided by it." in YARDSTICK_WORDS
