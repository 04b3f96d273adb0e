"""group_by_expert and combine against lists and loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels import reference
from moesaic.kernels.dispatch import Grouping, _permute_rows, combine, group_by_expert, tile_map


def as_lists(grouping: Grouping) -> tuple[object, ...]:
    return tuple(part.tolist() for part in grouping)


@settings(max_examples=200, deadline=None)
@given(
    n_experts=st.integers(1, 40),
    top_k=st.integers(1, 5),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.int16]),
    data=st.data(),
)
def test_any_ids_group_as_lists_do(n_experts: int, top_k: int, dtype: torch.dtype, data: st.DataObject) -> None:
    n_tokens = data.draw(st.integers(0, 30))
    flat = data.draw(st.lists(st.integers(-3, n_experts + 3), min_size=n_tokens * top_k, max_size=n_tokens * top_k))
    ids = torch.tensor(flat, dtype=dtype).view(n_tokens, top_k)
    grouping = group_by_expert(ids, n_experts)
    assert as_lists(grouping) == reference.group_by_expert(ids, n_experts)
    assert all(part.dtype == torch.int64 for part in grouping)


def test_a_million_experts() -> None:
    ids = torch.randint(0, 1_000_000, (64, 128), generator=torch.Generator().manual_seed(0))
    counts, offsets, permutation, inverse, n_skipped = group_by_expert(ids, 1_000_000)
    assert n_skipped == 0
    assert int(counts.sum()) == offsets[-1] == ids.numel()
    assert torch.equal(permutation[inverse], torch.arange(ids.numel()))
    grouped = ids.view(-1)[permutation]
    assert torch.equal(grouped, grouped.sort().values)
    assert torch.equal(torch.searchsorted(grouped, torch.arange(1_000_001)), offsets)


def test_stays_on_the_device() -> None:
    """Nothing in the path may need a value on the host: on the meta device there are none."""
    grouping = group_by_expert(torch.empty(7, 3, dtype=torch.int64, device="meta"), 5)
    assert [tuple(part.shape) for part in grouping] == [(5,), (6,), (21,), (21,), ()]
    rows, weights = torch.empty(21, 4, device="meta"), torch.empty(7, 3, device="meta")
    assert combine(rows, weights, grouping).shape == (7, 4)


def by_loop(rows: Tensor, weights: Tensor, ids: Tensor, n_experts: int) -> Tensor:
    *_, inverse, _ = reference.group_by_expert(ids, n_experts)
    out = []
    for t in range(ids.shape[0]):
        total = rows.new_zeros(rows.shape[1])
        for j in range(ids.shape[1]):
            if 0 <= ids[t, j] < n_experts:
                total = total + weights[t, j] * rows[inverse[t * ids.shape[1] + j]]
        out.append(total)
    return torch.stack(out)


def test_combine_matches_the_loop_and_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 6, (11, 3), generator=generator)
    rows = torch.randn(33, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(11, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    grouping = group_by_expert(ids, 5)
    upstream = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    got, truth = combine(rows, weights, grouping), by_loop(rows, weights, ids, 5)
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(got, (rows, weights), upstream),
        torch.autograd.grad(truth, (rows, weights), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda r, w: combine(r, w, grouping), (rows, weights))
    assert torch.autograd.gradgradcheck(lambda r, w: combine(r, w, grouping), (rows, weights))


def test_a_skipped_weight_is_never_read() -> None:
    ids = torch.tensor([[0, 2], [1, -1]])
    rows = torch.tensor([[1.0], [2.0], [0.0], [0.0]])
    weights = torch.tensor([[1.0, torch.nan], [1.0, torch.inf]], requires_grad=True)
    out = combine(rows, weights, group_by_expert(ids, 2))
    assert out.tolist() == [[1.0], [2.0]]
    (grad,) = torch.autograd.grad(out.sum(), weights)
    assert grad.tolist() == [[1.0, 0.0], [2.0, 0.0]]


def test_half_precision_sums_in_float32() -> None:
    rows = torch.full((256, 1), 1.0, dtype=torch.bfloat16)
    rows[0] = 256.0
    weights = torch.ones(1, 256)
    ids = torch.zeros(1, 256, dtype=torch.int64)
    # bf16 cannot count past 256 in steps of 1; float32 can, and 511 rounds to 512.
    assert combine(rows, weights, group_by_expert(ids, 1)).item() == 512.0
    # The float32 weight 1 + 2^-9 is not rounded to bf16's 1 on the way.
    nearly = torch.tensor([[1.0 + 2.0**-9, -1.0]])
    assert combine(rows[1:3], nearly, group_by_expert(ids[:, :2], 1)).item() == 2.0**-9


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"ids must be integers, got torch\.float32"):
        group_by_expert(torch.zeros(2, 2), 3)
    with pytest.raises(ValueError, match="n_experts must be at least 1, got 0"):
        group_by_expert(torch.zeros(2, 2, dtype=torch.int64), 0)
    grouping = group_by_expert(torch.zeros(2, 2, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match=r"rows must have shape \(4, N\), got \(3, 5\)"):
        combine(torch.zeros(3, 5), torch.zeros(2, 2), grouping)
    with pytest.raises(ValueError, match="weights must have the 4 elements"):
        combine(torch.zeros(4, 5), torch.zeros(2, 3), grouping)


def test_opcheck() -> None:
    order = torch.tensor([2, 0, 1])
    torch.library.opcheck(_permute_rows, (torch.randn(3, 2, requires_grad=True), order, order.argsort()))


def test_numba_and_pytorch_group_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    for n_experts, n_slots in ((1, 0), (7, 1000), (5000, 300), (1_000_000, 999)):
        ids = torch.randint(-2, n_experts + 3, (n_slots,), generator=torch.Generator().manual_seed(1))
        with monkeypatch.context() as patch:
            patch.setattr("moesaic.kernels.dispatch.find_spec", lambda name: None)
            plain = group_by_expert(ids, n_experts)
        ours = group_by_expert(ids, n_experts)
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@settings(max_examples=100, deadline=None)
@given(n_experts=st.integers(1, 20), block=st.integers(1, 9), data=st.data())
def test_tiles_cover_each_row_once_and_no_two_experts(n_experts: int, block: int, data: st.DataObject) -> None:
    flat = data.draw(st.lists(st.integers(-1, n_experts), max_size=60))
    grouping = group_by_expert(torch.tensor(flat, dtype=torch.int64), n_experts)
    expert, first_row, n_tiles = tile_map(grouping, block)
    assert expert.shape == first_row.shape == (-(-len(flat) // block) + min(n_experts, len(flat)),)
    assert int(n_tiles) <= len(expert)
    covered = []
    for e, first in zip(expert[: int(n_tiles)].tolist(), first_row[: int(n_tiles)].tolist(), strict=True):
        end = min(first + block, int(grouping.offsets[e + 1]))
        assert int(grouping.offsets[e]) <= first < end
        covered += list(range(first, end))
    assert covered == list(range(int(grouping.offsets[-1])))
    assert (expert[int(n_tiles) :] == n_experts).all()
    assert (first_row[int(n_tiles) :] == grouping.offsets[-1]).all()


def test_tile_map_refuses_and_stays_on_the_device() -> None:
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        tile_map(group_by_expert(torch.zeros(2, dtype=torch.int64), 3), 0)
    grouping = group_by_expert(torch.empty(7, 3, dtype=torch.int64, device="meta"), 5)
    assert tile_map(grouping, 4).expert.shape == (6 + 5,)
    torch.library.opcheck(torch.ops.moesaic.group_by_expert.default, (torch.tensor([1, 0, 5, -1]), 3))
