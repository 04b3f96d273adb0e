"""Colours of figures and reports.

After Okabe and Ito (2008), whose palette stays apart under the common colour-vision deficiencies; families also differ
in marker.
"""

from __future__ import annotations

INK, MUTED, GRID, PAPER = "#1f2328", "#5c646d", "#dde2e7", "#ffffff"
DENSE, MOE, THIRD, FOURTH = "#0072b2", "#c84e00", "#007a5a", "#a3457c"
PALE_MOE = "#f3c9a8"
DARK = {
    INK: "#e6e9ec", MUTED: "#9aa4ae", GRID: "#343a41", PAPER: "#14171a",
    DENSE: "#56b4e9", MOE: "#f0883e", THIRD: "#2bc296", FOURTH: "#e58fc0", PALE_MOE: "#5e3a1d",
}  # fmt: skip
"""Each colour's counterpart on a dark page, so that a report shows one SVG in both themes."""
