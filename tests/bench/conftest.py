"""What the tests of benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moesaic.bench import bench_layer, roofline
from moesaic.bench.roofline import Roof


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count no covered lines: of bench/ none would be, other packages have tests of their own, and plots take twice."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.no_cover)


@pytest.fixture
def roof() -> Roof:
    """Rates that no machine has."""
    return Roof({"float32": 1e11, "bfloat16": 1e10}, 1e10, "a device", "now", {})


@pytest.fixture(autouse=True)
def roofs_asked(monkeypatch: pytest.MonkeyPatch, roof: Roof) -> list[str]:
    """Every benchmark is under a given roof; holds the devices of which it was asked."""
    asked: list[str] = []

    def measured_roof(device: str, say: Callable[[str], None]) -> Roof:
        asked.append(device)
        return roof

    monkeypatch.setattr(roofline, "measured_roof", measured_roof)
    return asked


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short rounds, on one thread: on a busy machine the others would only be waited for."""
    monkeypatch.setattr(bench_layer, "QUICK_LEAST_S", 1e-3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
