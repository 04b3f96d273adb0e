"""The step in stripes over features, run by Triton's interpreter, against autograd on a dense batch in float64.

Triton decides between compiler and interpreter on import, so this file is also a program.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.kernels import stripes_triton
from moesaic.kernels.feature_state import AdamStep, Assignment, Columns, FeatureShape

TOLERANCE = 2e-5
"""Worst error, of a change for table and moments, over the true value's RMS; five times that for changes, of which
float32 keeps fewer digits."""
LR, DECAY, STEP, KEY = 0.05, 0.1, 7, 0x9ABCDEF0
N = 140

if os.environ.get("TRITON_INTERPRET") == "1":
    # The first optimizer imports for two seconds: once here, not in each program's fork.
    torch.optim.AdamW([torch.zeros(1)])


class Case:
    """A model, a batch in which most features are absent, and encodings."""

    def __init__(self, *, m: int = 5, e: int = 1, k: int = 1, m0: int = 0, tied: bool = True, batch: int = 7,
                 density: float = 0.02, empty: int | None = None, n: int = N,
                 moments: torch.dtype = torch.float32) -> None:  # fmt: skip
        draw = torch.Generator().manual_seed(m + 10 * e + 100 * k + m0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=draw)

        self.shape = FeatureShape(n, m, e, k, m0, tied, e > 1)
        size = (n, self.shape.stride)
        self.table, self.avg, self.sq = 0.5 * normal(*size), 0.02 * normal(*size), 1e-3 * normal(*size).abs() + 1e-5
        self.avg, self.sq = self.avg.to(moments), self.sq.to(moments)
        self.x = normal(batch, n).abs() * (torch.rand(batch, n, generator=draw) < density)
        self.columns = Columns.of(self.x.to_sparse_csr())
        self.importance = 0.5 + torch.rand(n, generator=draw)
        scores = torch.rand(batch, e, generator=draw)
        if empty is not None:
            scores[:, empty] = -1
        chosen = scores.topk(k, 1).indices
        order = torch.argsort(chosen.flatten(), stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(batch * k)
        offsets = torch.tensor([0, *torch.bincount(chosen.flatten(), minlength=e).tolist()]).cumsum(0)
        gates = 0.2 + torch.rand(batch * k, generator=draw)
        self.assignment = Assignment(offsets, order // k, gates, places.reshape(batch, k))
        self.h, self.h0 = normal(batch * k, m), normal(batch, m0) if m0 else None
        self.dlogits = normal(batch, e) if self.shape.routed else None
        self.extra = 0.1 * normal(batch * k, m)
        self.scale = 1 / max(1, batch)

    def run(
        self, *, precision: str = "ieee", stripe: int = 128, forget: str = "", device: str = "cpu"
    ) -> dict[str, Tensor]:
        """A whole step; ``extra`` is what the load-balance loss might add to dh."""

        def there(*tensors: Any) -> list[Any]:
            return [None if tensor is None else tensor.to(device, copy=True) for tensor in tensors]

        table, avg, sq, h, h0, dlogits, extra, importance = there(
            self.table, self.avg, self.sq, self.h, self.h0, self.dlogits, self.extra, self.importance
        )
        assignment, columns = Assignment(*there(*vars(self.assignment).values())), Columns(*there(*self.entries()))
        given = (self.shape, table, avg, sq, h, h0, assignment, columns, importance, self.scale)
        adam = AdamStep.at(STEP, lr=LR, weight_decay=DECAY)
        how: dict[str, Any] = {"precision": precision, "stripe": stripe, "key": KEY}
        swept = stripes_triton.sweep(*given, adam, **how)
        dh = swept.dh * 0 if forget == "dh" else swept.dh + extra
        stripes_triton.finish(*given, adam, dh, swept.shared_dh, dlogits, **how)
        found = {"loss": swept.loss, "dh": swept.dh, "dgates": swept.dgates, "table": table, "avg": avg, "sq": sq}
        found |= {} if swept.shared_dh is None else {"shared_dh": swept.shared_dh}
        return {name: tensor.cpu() for name, tensor in found.items()}

    def entries(self) -> list[Tensor]:
        return [self.columns.features, self.columns.starts, self.columns.samples, self.columns.values]

    def truth(self) -> dict[str, Tensor]:
        """The same by autograd and `torch.optim.AdamW`, all in float64."""
        table, x = self.table.double().requires_grad_(), self.x.double()
        part, a = self.shape.named(table), self.assignment
        h, gates = self.h.double().requires_grad_(), a.gates.double().requires_grad_()
        h0 = None if self.h0 is None else self.h0.double().requires_grad_()
        out = torch.zeros_like(x)
        decoder, shared_decoder = (part.get(name, part.get(other)) for name, other in
                                   (("decoder", "weight"), ("shared_decoder", "shared_weight")))  # fmt: skip
        assert decoder is not None
        expert_of = torch.bucketize(torch.arange(h.shape[0]), a.offsets[1:], right=True)
        for place, (sample, e) in enumerate(zip(a.samples.tolist(), expert_of.tolist(), strict=True)):
            y = torch.relu(decoder[e] @ h[place] + part["bias"][e])
            out = out.index_add(0, torch.tensor([sample]), (gates[place] * y)[None])
        if h0 is not None:
            assert shared_decoder is not None
            out = out + torch.relu(h0 @ shared_decoder.T + part["shared_bias"])
        loss = self.scale * (self.importance.double() * (out - x).square()).sum()
        if loss.requires_grad:
            loss.backward()
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (table, h, gates)]
        found = {"loss": loss.detach(), "dh": grads[1], "dgates": grads[2]}
        full = grads[0].clone()
        views = self.shape.named(full)
        for place, (sample, e) in enumerate(zip(a.samples.tolist(), expert_of.tolist(), strict=True)):
            views["weight"][e] += torch.outer(x[sample], grads[1][place] + self.extra[place])
        if h0 is not None:
            found["shared_dh"] = torch.zeros_like(h0) if h0.grad is None else h0.grad
            views["shared_weight"] += x.T @ found["shared_dh"]
        if self.dlogits is not None:
            views["router"] += (x.T @ self.dlogits.double()).T
        leaf = self.table.double().requires_grad_()
        adam = torch.optim.AdamW([leaf], lr=LR, weight_decay=DECAY)
        adam.state[leaf] = {
            "step": torch.tensor(float(STEP)), "exp_avg": self.avg.double(), "exp_avg_sq": self.sq.double()
        }  # fmt: skip
        leaf.grad = full
        adam.step()
        state = adam.state[leaf]
        return found | {"table": leaf.detach(), "avg": state["exp_avg"], "sq": state["exp_avg_sq"]}

    def wrong(self, found: dict[str, Tensor] | None = None, **how: Any) -> list[str]:
        """What differs; of table and moments their changes are compared, and padding must stay as it was."""
        found, truth, wrong = found or self.run(**how), self.truth(), []
        width = self.shape.n_columns
        for name, true in truth.items():
            got, before = found[name].double(), getattr(self, name, None) if name in ("table", "avg", "sq") else None
            tolerance, rounding = TOLERANCE, 0.0
            if before is not None:
                if not torch.equal(found[name][:, width:], before[:, width:]):
                    wrong.append(f"{name}: padding")
                if before.dtype == torch.bfloat16:
                    bound = 2**-7 * true.abs() + 1e-12
                    if not ((got - true).abs() <= bound)[:, :width].all():
                        wrong.append(f"{name}: rounded too far")
                    continue
                got, true = (tensor[:, :width] - before[:, :width].double() for tensor in (got, true))
                rounding, tolerance = 2**-23 * float(before.abs().max()), 5 * tolerance
            if got.shape != true.shape:
                wrong.append(f"{name}: {tuple(got.shape)} for {tuple(true.shape)}")
                continue
            if not true.numel():
                continue
            error, size = float((got - true).abs().max()), float(true.square().mean().sqrt())
            if not error <= tolerance * size + rounding:
                wrong.append(f"{name}: {error:.1e} of {size:.1e}")
        return wrong


def poisoned() -> None:
    true = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        out = true(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(2**30)

    torch.empty = filled


def dense() -> list[str]:
    """Stripes that do not divide n, and one that is wider; tiles of rows and of hidden units; descriptors."""
    case, wide = Case(n=270, batch=24, density=0.03), Case(m=40, batch=3)
    poisoned()
    return case.wrong() + wide.wrong(precision="tf32x3", stripe=256)


def experts() -> list[str]:
    """An expert without rows and an encoder of its own, or two experts for each sample."""
    one, two = Case(e=4, empty=2, tied=False), Case(m=3, e=4, k=2)
    poisoned()
    return one.wrong() + two.wrong()


def shared() -> list[str]:
    one, two = Case(e=4, m=1, m0=3), Case(e=3, k=2, m0=2, tied=False, empty=0)
    poisoned()
    return one.wrong() + two.wrong()


def nothing() -> list[str]:
    """No entries, no samples, nothing but present features."""
    found = []
    for name, case in {
        "no entries": Case(e=2, density=0.0, n=130), "no samples": Case(e=3, k=2, m0=2, batch=0, n=130),
        "all present": Case(e=2, density=1.0, n=100, batch=3),
    }.items():  # fmt: skip
        found += [f"{name}: {text}" for text in case.wrong()]
    return found


def twice_and_without_an_update() -> list[str]:
    """The same bits again; without ``adam`` the table stays, and loss and gradients are the same."""
    case = Case(e=2, k=2, m0=2)
    first, second = case.run(), case.run()
    wrong = [name for name in first if not torch.equal(first[name], second[name])]
    table, avg, sq = case.table.clone(), case.avg.clone(), case.sq.clone()
    swept = stripes_triton.sweep(
        case.shape, table, avg, sq, case.h, case.h0, case.assignment, case.columns, case.importance, case.scale, None,
        stripe=128,
    )  # fmt: skip
    if not (torch.equal(table, case.table) and torch.equal(avg, case.avg) and torch.equal(sq, case.sq)):
        wrong.append("the table without adam")
    ours = (("loss", swept.loss), ("dh", swept.dh), ("dgates", swept.dgates), ("shared_dh", swept.shared_dh))
    return wrong + [f"{name} without adam" for name, got in ours if got is None or not torch.equal(got, first[name])]


def fmix32(h: Any) -> Any:
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x85EBCA6B)
    h = h ^ (h >> np.uint32(13))
    h = h * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def narrow_moments() -> list[str]:
    """bfloat16 moments: the update is float32's, and where the gradient is 0 the rounding is the hash's, bit by bit."""
    case = Case(e=2, empty=1, moments=torch.bfloat16)
    found = case.run()
    wrong = case.wrong(found)
    absent = torch.ones(N, dtype=torch.bool)
    absent[case.columns.features] = False
    first, (_, m) = case.shape.sections["weight"]
    columns = slice(first + m, first + 2 * m)
    index = (torch.arange(N)[:, None] * case.shape.stride + torch.arange(case.shape.stride))[absent, columns].numpy()
    low, high = index.astype(np.uint32), (index >> 32).astype(np.uint32)
    hashed = fmix32(low ^ fmix32(high ^ np.uint32(KEY)))
    one1, b2 = np.float32(1 - 0.9), np.float32(0.999)
    avg, sq = (tensor[absent, columns].float().numpy() for tensor in (case.avg, case.sq))
    for name, value, bits in (
        ("avg", avg + one1 * (np.float32(0) - avg), fmix32(hashed)),
        ("sq", b2 * sq, fmix32(hashed ^ np.uint32(0x9E3779B9))),
    ):
        ours = found[name][absent, columns].view(torch.int16).numpy().view(np.uint16)
        near = ((value.view(np.uint32) + (bits & np.uint32(0xFFFF))) >> np.uint32(16)).astype(np.uint16)
        if not np.array_equal(ours, near):
            wrong.append(f"{name}: other bits")
    return wrong


def every_feature(step: stripes_triton._Step) -> Iterator[Tensor]:
    return step._stripes(torch.arange(step.shape.n_features))


def errors_are_seen() -> list[str]:
    """An expert left out, dh forgotten, present features updated twice: each is red."""
    case, missed = Case(e=2), []
    if not {"table", "avg"} <= names(case.wrong(forget="dh")):
        missed.append("dh forgotten in finish")
    absent = stripes_triton._Step.absent
    stripes_triton._Step.absent = every_feature  # type: ignore[assignment, method-assign]
    if not {"loss", "table", "sq"} <= names(case.wrong()):
        missed.append("presence ignored")
    stripes_triton._Step.absent = absent  # type: ignore[method-assign]
    first = case.assignment.offsets[1]
    whole = Case.run

    def without(self: Case, **how: Any) -> dict[str, Tensor]:
        kept, self.assignment.gates[first:] = self.assignment.gates.clone(), 0.0
        found = whole(self, **how)
        self.assignment.gates[:] = kept
        return found

    Case.run = without  # type: ignore[method-assign]
    if not {"loss", "dh", "dgates", "table", "avg", "sq"} <= names(case.wrong()):
        missed.append("an expert left out")
    return missed


def names(wrong: list[str]) -> set[str]:
    return {text.split(":")[0] for text in wrong}


PROGRAMS: dict[str, Callable[[], list[str]]] = {
    part.__name__: part
    for part in (dense, experts, shared, nothing, twice_and_without_an_update, narrow_moments, errors_are_seen)
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_interpreted(name: str, interpret: Callable[[str], None]) -> None:
    interpret(name)


GPU_CASES: list[dict[str, Any]] = [
    {"m": 100, "batch": 250, "n": 700}, {"m": 16, "e": 8, "batch": 150, "n": 700, "empty": 3},
    {"m": 33, "e": 4, "k": 2, "m0": 7, "batch": 90, "n": 300, "tied": False}, {"m": 1, "batch": 20, "n": 300},
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", GPU_CASES)
@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_cuda(sizes: dict[str, Any], precision: str) -> None:
    case = Case(**sizes)
    found = case.run(device="cuda", precision=precision, stripe=256)
    assert not case.wrong(found)
    again = case.run(device="cuda", precision=precision, stripe=256)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", GPU_CASES)
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_cuda_in_bf16(sizes: dict[str, Any], moments: torch.dtype) -> None:
    case = Case(**sizes, moments=moments)
    found, truth = case.run(device="cuda", precision="bf16", stripe=256), case.truth()
    for name, true in truth.items():
        got = found[name].double()
        if name in ("table", "avg", "sq"):
            # Of a bfloat16 moment a step's change is below the rounding.
            before = getattr(case, name).double() * (name == "table" or moments == torch.float32)
            got, true = (
                tensor[:, : case.shape.n_columns] - before[:, : case.shape.n_columns] for tensor in (got, true)
            )
        error = (got - true).square().mean().sqrt() / true.square().mean().sqrt()
        # Operands are rounded by 2⁻⁹ each; a rounded z may also cross 0, and small gradients are scaled by Adam.
        assert error < (0.02 if name in ("loss", "dh", "dgates", "shared_dh") else 0.1), (name, float(error))
