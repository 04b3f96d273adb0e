from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesaic.bench import memory


@pytest.mark.parametrize("mib", [60, 200])
def test_it_sees_what_a_call_holds_and_frees(mib: int) -> None:
    def work() -> None:
        for _ in range(3):
            torch.ones(mib * 2**18)

    for _ in range(2):
        peak = memory.peak_bytes(work, "cpu")
        if peak is None:
            pytest.skip("this system does not say")
        assert mib * 2**20 <= peak + 2**20
        assert peak < (mib + 12) * 2**20


def test_without_the_systems_word_it_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_RESET", tmp_path / "missing" / "clear_refs")
    assert memory.peak_bytes(lambda: None, "cpu") is None
