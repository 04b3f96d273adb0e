"""Where the time of an exact step goes, dense and with experts: what is measured and what is computed is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from moesaic.bench.interleave import Timing, clock, interleave
from moesaic.bench.kernel_bench import Table
from moesaic.bench.million_cases import LR, Sizes, Stepper
from moesaic.bench.plan import Row
from moesaic.kernels.encode_features import encode_features
from moesaic.kernels.feature_route import Route, encode
from moesaic.kernels.feature_state import AdamStep, Columns
from moesaic.kernels.stripes import finish, sweep

STEP, BEFORE, SWEEP, PLAIN, FINISH, PRODUCT = "step", "before", "sweep", "sweep without AdamW", "finish", "product"
SQUARE = 1024
"""Sides of the matrices whose product's rate stands for the chip's."""


def parts_of(stepper: Stepper) -> dict[str, Callable[[int], object]]:
    """The parts of an exact step on one batch, each repeated so many times on the same state."""
    shape, state, training, x = stepper.model.shape, stepper.state, stepper.training, stepper.batches[0]
    views = shape.named(state.table)

    def before() -> tuple[Route, torch.Tensor, Columns]:
        logits = encode_features(x, views["router"].T).requires_grad_() if shape.routed else None
        route = Route.of(logits, x.shape[0], shape, training)
        return route, encode(shape, views, x, route)[0], Columns.of(x)

    route, h, columns = before()
    common = (
        shape, state.table, state.exp_avg, state.exp_avg_sq, h, None, route.assignment, columns, training.importance,
        training.scale,
    )  # fmt: skip
    adam = AdamStep.at(1000, lr=LR)
    options: dict[str, Any] = {"precision": training.precision, "stripe": training.stripe}
    swept = sweep(*common, None, **options)
    dlogits = route.backward(swept.dgates)

    def repeat(work: Callable[[], object], count: int) -> None:
        for _ in range(count):
            work()

    return {
        STEP: stepper.repeat,
        BEFORE: partial(repeat, before),
        SWEEP: partial(repeat, partial(sweep, *common, adam, **options)),
        PLAIN: partial(repeat, partial(sweep, *common, None, **options)),
        FINISH: partial(repeat, partial(finish, *common, adam, swept.dh, None, dlogits, **options)),
    }


def product_rate(sizes: Sizes, device: str, *, rounds: int, least_s: float) -> float:
    """FLOPs per second of PyTorch's product of square matrices, in the precision of the steps: about the chip's."""
    dtype = torch.bfloat16 if sizes.precision == "bf16" else torch.float32
    left, right, out = (torch.ones(SQUARE, SQUARE, device=device, dtype=dtype) for _ in range(3))
    work = {PRODUCT: clock(lambda count: [torch.mm(left, right, out=out) for _ in range(count)], device)}
    return 2 * SQUARE**3 / interleave(work, rounds=rounds, least_s=least_s)[PRODUCT].low


def breakdown(sizes: Sizes, device: str, bandwidth: float, *, rounds: int, least_s: float) -> tuple[Table, list[Row]]:
    """Time the parts of exact steps of both models in turn, next to what their FLOPs and bytes cost at best.

    Args:
        sizes: what is measured.
        device: ``cpu`` or ``cuda``.
        bandwidth: of a copy, in bytes per second.
        rounds: of `interleave`.
        least_s: of `interleave`.
    """
    rate = product_rate(sizes, device, rounds=rounds, least_s=least_s)
    steppers = [Stepper.of(model, sizes, device) for model in (sizes.dense, sizes.mixture)]
    work = {
        (number, part): clock(run, device) for number, s in enumerate(steppers) for part, run in parts_of(s).items()
    }
    timings = interleave(work, rounds=rounds, least_s=least_s)
    columns = [
        _seconds(
            {part: timings[number, part] for part in (STEP, BEFORE, SWEEP, PLAIN, FINISH)}, stepper, rate, bandwidth
        )
        for number, stepper in enumerate(steppers)
    ]
    lines, rows = [], []
    for (part, how), dense in columns[0].items():
        moe = columns[1][part, how]
        ratio = f"{dense / moe:.3g}" if moe > 0 and dense > 0 else "-"
        lines.append((part, how, f"{1e3 * dense:.4g}", f"{1e3 * moe:.4g}", ratio))
        rows.append({"case": "breakdown", "part": part, "how": how, "dense_ms": 1e3 * dense, "moe_ms": 1e3 * moe})
    names = [stepper.model.name for stepper in steppers]
    table = Table(
        f"Where the time of an exact step goes, n = {sizes.n_features:,}",
        ("part", "how known", f"{names[0]}, ms", f"{names[1]}, ms", "dense / MoE"), lines,
        (
            f"Computed lines are no parts of the sum: what the FLOPs take at {rate / 1e9:.3g} GFLOP/s, the rate of "
            f"PyTorch's product of {SQUARE} × {SQUARE} matrices here, and what the bytes of table and both moments, "
            f"read and written, take at a copy's {bandwidth / 1e9:.3g} GB/s. Differences are those of medians.",
        ),
    )  # fmt: skip
    return table, rows


def _seconds(
    timings: Mapping[str, Timing], stepper: Stepper, rate: float, bandwidth: float
) -> dict[tuple[str, str], float]:
    """Seconds of each line of the table, by what it is and how it is known."""
    model, batch = stepper.model, stepper.batches[0].shape[0]
    taken = {part: timing.median for part, timing in timings.items()}
    products = model.decode_flops(batch * model.n_features) / rate
    moved = {name: size / bandwidth for name, size in stepper.section_bytes().items()}
    bytes_of = {name: moved.get(name, 0.0) for name in ("weight", "bias", "router", "padding")}
    measured, difference, computed = "measured", "difference", "computed"
    return {
        ("whole step", measured): taken[STEP],
        ("encode, route, order by column", measured): taken[BEFORE],
        ("all features: decode, loss, gradients", measured): taken[PLAIN],
        ("- its products at PyTorch's rate", computed): products,
        ("- the rest: elementwise work, reading, slower products", difference): taken[PLAIN] - products,
        ("all features: AdamW", difference): taken[SWEEP] - taken[PLAIN],
        ("- bytes of weights at a copy's rate", computed): bytes_of["weight"],
        ("- bytes of biases", computed): bytes_of["bias"],
        ("- bytes of the router", computed): bytes_of["router"],
        ("- bytes of padding", computed): bytes_of["padding"],
        ("present features once more, their AdamW", measured): taken[FINISH],
    }
