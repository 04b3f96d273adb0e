"""``moesaic bench routing``: top-k routing and grouping against their composition in PyTorch, in one process, in turn.

    ours    route_topk(logits, k) → group_by_expert(ids)
    torch   softmax → topk → renormalise → stable sort of ids → bincount → cumsum

on the same logits, forward, and forward with the gradient of the logits. The last cases have too many experts for a row
of logits per token: there the projection is part of the work, with its d stated. Least time: that of the bytes that
have to move (logits once, k weights and ids) at a copy's bandwidth, or of the projection's products if that is more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.bench.environment import device_memory_bytes
from moesaic.bench.interleave import Contender, Timing, clock, fastest, ratio, with_threads
from moesaic.bench.kernel_bench import Findings, Options, Table
from moesaic.bench.memory import peak_bytes
from moesaic.bench.plan import Row
from moesaic.bench.roofline import Roof, RoofPoint
from moesaic.bench.routing_limit import routing_limits
from moesaic.kernels import group_by_expert, route, route_topk

OURS, PEER = "moesaic", "torch"
TOKENS = (512, 4096, 32768)
EXPERTS = ((8, 2), (64, 8), (128, 8), (256, 8), (1024, 64))
LARGE, WIDTH = (65536, 32), 64
"""(E, k) and d of the case with its projection."""
ROUNDS, LEAST_S = 7, 0.2
QUICK_ROUNDS, QUICK_LEAST_S = 3, 0.05
ROTATED_BYTES = 2**27
AGREEMENT, EXCEPTIONS = 1e-4, 1e-3
HEADER = ("T, E, k", "pass", "side", "ms", "GB/s", "of the roof", "ratio")
NOTES = (
    "ms: median of the rounds [fastest-slowest]. GB/s: logits read once, weights and ids written once (and, for the "
    "gradient, logits and their gradients' rows moved once more), over the time. of the roof: the least time that a "
    "copy's bandwidth allows those bytes, or the matrix rate a projection's products, over the time.",
    f"ratio: time of {PEER} over {OURS}'s, of the medians [lowest-highest within one round].",
    "On a CPU torch is timed with all threads and, without a projection, with one, and the faster counts.",
    f"Only peers are timed whose weights and gradients differ from {OURS}'s by at most {AGREEMENT:g} of their RMS, but "
    f"for {EXCEPTIONS:g} of them: PyTorch ranks probabilities, which tie where logits do not, and may choose another.",
    "Repetitions take turns on copies of their inputs, 128 MiB in all where they fit, more than a cache holds.",
)


@dataclass(frozen=True)
class Case:
    """T tokens, E experts, k chosen; ``width`` d where the projection from x (T, d) is part of the work, else 0."""

    n_tokens: int
    n_experts: int
    top_k: int
    width: int = 0

    @property
    def name(self) -> str:
        """T, E, k and, if there is a projection, d."""
        return f"{self.n_tokens}, {self.n_experts}, {self.top_k}" + (f", d = {self.width}" if self.width else "")

    @property
    def logits_bytes(self) -> int:
        """Of all logits in float32."""
        return 4 * self.n_tokens * self.n_experts

    def least_bytes(self, *, backward: bool) -> int:
        """Bytes that have to move: logits (or x and the router) in, weights and ids out; and for the gradient again."""
        given = 4 * self.width * (self.n_tokens + self.n_experts) if self.width else self.logits_bytes
        chosen = (4 + 8) * self.n_tokens * self.top_k
        return given + chosen + (2 * given + chosen if backward else 0)

    def flops(self, *, backward: bool) -> int:
        """Useful products: 2·T·E·d of the projection; for the gradient 4·T·k·d, as only chosen logits have one."""
        products = self.n_experts + (2 * self.top_k if backward else 0)
        return 2 * self.n_tokens * self.width * products


@dataclass(frozen=True)
class Measured:
    """One case and pass: timings by side, why a side is missing, and peak memory beyond the inputs, by side."""

    case: Case
    backward: bool
    timings: Mapping[str, Timing]
    not_run: Mapping[str, str]
    memory: Mapping[str, int | None]

    def point(self, name: str) -> RoofPoint:
        """A side's time, to be drawn under a roof."""
        case, backward = self.case, self.backward
        flops, moved = case.flops(backward=backward), case.least_bytes(backward=backward)
        return RoofPoint(case.name, name, self.which, flops, moved, self.timings[name].median)

    def row(self, roof: Roof) -> Row:
        """The case as JSON values."""
        case, ours = self.case, self.timings[OURS]
        moved = case.least_bytes(backward=self.backward)
        return {
            "n_tokens": case.n_tokens, "n_experts": case.n_experts, "top_k": case.top_k, "d": case.width or None,
            "pass": self.which, "flops": case.flops(backward=self.backward), "least_bytes": moved,
            "logits_bytes": case.logits_bytes,
            "sides": {
                name: {
                    "ms": 1e3 * timing.median, "ms_lowest": 1e3 * timing.low, "ms_highest": 1e3 * timing.high,
                    "bytes_per_s": moved / timing.median, "of_the_roof": self.point(name).of(roof),
                    "peak_memory_bytes": self.memory.get(name),
                }
                for name, timing in self.timings.items()
            },
            "ratio": ratio(self.timings[PEER], ours) if PEER in self.timings else None, "not_run": dict(self.not_run),
        }  # fmt: skip

    @property
    def which(self) -> str:
        """The name of the pass."""
        return "forward and backward" if self.backward else "forward"

    def lines(self, roof: Roof) -> list[tuple[str, ...]]:
        """The case's lines of the table."""
        lines: list[tuple[str, ...]] = []
        for name, timing in self.timings.items():
            speed = self.case.least_bytes(backward=self.backward) / timing.median
            times = "1"
            if name != OURS:
                found = ratio(timing, self.timings[OURS])
                times = f"{found['median']:.2g} [{found['low']:.2g}-{found['high']:.2g}]"
            ms = f"{1e3 * timing.median:.3g} [{1e3 * timing.low:.3g}-{1e3 * timing.high:.3g}]"
            share = f"{100 * self.point(name).of(roof):.0f} %"
            lines.append((self.case.name, self.which, name, ms, f"{speed / 1e9:.3g}", share, times))
        return lines + [(self.case.name, self.which, name, "not run", "", "", "") for name in self.not_run]


def cases(quick: bool) -> list[Case]:
    """The cases, the one with a projection last."""
    tokens = TOKENS[:1] if quick else TOKENS
    found = [Case(n_tokens, *sizes) for n_tokens in tokens for sizes in EXPERTS]
    return [*found, *(Case(n_tokens, *LARGE, WIDTH) for n_tokens in tokens)]


def composition(logits: Tensor, k: int) -> tuple[Tensor, ...]:
    """Routing and grouping as PyTorch offers them."""
    weights, ids = torch.topk(torch.softmax(logits, -1), k)
    weights = weights / weights.sum(-1, keepdim=True)
    order = torch.sort(ids.flatten(), stable=True)
    counts = torch.bincount(ids.flatten(), minlength=logits.shape[-1])
    return weights, ids, order.indices, counts, counts.cumsum(0)


def _sides(case: Case, device: str, *, backward: bool) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """What each side does once; the first result is the weights, the last the gradient if there is one."""
    generator = torch.Generator().manual_seed(case.n_experts)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    given = [draw(case.n_tokens, case.width or case.n_experts)]
    if case.width:
        given.append(draw(case.n_experts, case.width) / case.width**0.5)
    copies = 1 if case.width else max(1, min(64, ROTATED_BYTES // case.logits_bytes))
    turns = [[tensor.clone().requires_grad_(backward) for tensor in given] for _ in range(copies)]
    taken: dict[str, Iterator[list[Tensor]]] = {name: cycle(turns) for name in (OURS, PEER)}

    def finish(given: list[Tensor], weights: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return (weights.detach(), *rest, *(torch.autograd.grad(weights, given, weights.detach()) if backward else ()))

    def ours() -> tuple[Tensor, ...]:
        take: Any = route if case.width else route_topk
        given = next(taken[OURS])
        weights, ids = take(*given, case.top_k, renormalize=True)
        return finish(given, weights, *group_by_expert(ids, case.n_experts)[:3])

    def torch_side() -> tuple[Tensor, ...]:
        given = next(taken[PEER])
        weights, _, *rest = composition(given[0] @ given[1].T if case.width else given[0], case.top_k)
        return finish(given, weights, *rest)

    return {OURS: ours, PEER: torch_side}


def _repeat(work: Callable[[], object], count: int) -> None:
    for _ in range(count):
        work()


def measure(case: Case, options: Options, *, backward: bool) -> Measured:
    """Check that the sides agree, then time them in turn and take their peak memory."""
    sides, not_run = _sides(case, options.device, backward=backward), {}
    # Softmax, a copy of it for the top-k, and their gradients.
    needed = case.logits_bytes * (6 if backward else 3)
    available = device_memory_bytes(options.device)
    if case.width and ((available and needed > available / 2) or options.quick):
        del sides[PEER]
        not_run[PEER] = f"takes about {needed / 2**30:.0f} GiB" if not options.quick else "left out by --quick"
    memory = {name: peak_bytes(side, options.device) for name, side in sides.items()} if case.width else {}
    if PEER in sides:
        a, b = (sides[name]() for name in (OURS, PEER))
        gradients = (2 if case.width else 1) if backward else 0
        compared = [(a[0], b[0]), *zip(a[len(a) - gradients :], b[len(b) - gradients :], strict=True)]
        apart = [float(((x - y).abs() > AGREEMENT * y.square().mean().sqrt()).float().mean()) for x, y in compared]
        if not max(apart) <= EXCEPTIONS:
            not_run[PEER] = "disagrees on weights or gradients"
            del sides[PEER]
    most = torch.get_num_threads()
    contenders: dict[tuple[str, int], Contender] = {}
    for name, side in sides.items():
        contender = clock(partial(_repeat, side), options.device)
        choices = {most, 1} if name == PEER and options.device == "cpu" and not case.width else {most}
        contenders |= {(name, count): with_threads(contender, count) for count in sorted(choices, reverse=True)}
    rounds, least_s = (QUICK_ROUNDS, QUICK_LEAST_S) if options.quick or case.width else (ROUNDS, LEAST_S)
    timings, _ = fastest(contenders, rounds=rounds, least_s=least_s)
    return Measured(case, backward, timings, not_run, memory)


def run(options: Options) -> Findings:
    """Measure all cases, forward and with the gradient."""
    roof = options.roof
    found = []
    for case in cases(options.quick):
        for backward in (False, True):
            found.append(measure(case, options, backward=backward))
            for line in found[-1].lines(roof):
                options.say(f"bench routing {line[0]}, {line[1]}: {line[2]} {line[3]} ms, ratio {line[6] or '-'}")
    lines = [line for one in found for line in one.lines(roof)]
    reasons = [f"{one.case.name}, {one.which}: {p} not run: {why}" for one in found for p, why in one.not_run.items()]
    memory = [
        f"{one.case.name}, {one.which}: peak memory of {name} {peak / 2**20:.0f} MiB, "
        f"{100 * peak / one.case.logits_bytes:.2g} % of the (T, E) logits"
        for one in found
        for name, peak in one.memory.items()
        if peak is not None
    ]
    title = f"Routing and grouping; a copy moves {roof.copy_bytes_per_s / 1e9:.3g} GB/s here"
    limits, compiled = routing_limits()
    failures = [reason for reason in reasons if "disagrees" in reason]
    return Findings(
        [one.row(roof) for one in found], [Table(title, HEADER, lines, (*NOTES, *memory, *reasons)), limits],
        partial(draw, found), {"compiler": compiled}, failures,
        [one.point(name) for one in found for name in one.timings], HEADER[0],
    )  # fmt: skip


def draw(found: Sequence[Measured], folder: Path) -> list[Path]:
    """Times of both sides and their ratio, one row of marks per case."""
    from moesaic.bench.palette import DENSE, MOE
    from moesaic.bench.plot_style import panels, save, style

    looks = {OURS: (MOE, "o"), PEER: (DENSE, "s")}
    with style():
        figure, axes = panels(1, 2, width=4.0, height=0.9 + 0.24 * len(found) / 2, sharey=True)
        for axis, backward in zip(axes[0], (False, True), strict=True):
            here = [one for one in found if one.backward == backward]
            for name, (colour, marker) in looks.items():
                marks = [(one.timings[name].median * 1e3, y) for y, one in enumerate(here) if name in one.timings]
                axis.plot([x for x, _ in marks], [y for _, y in marks], marker, color=colour, ms=4.5, label=name)
            for y, one in enumerate(here):
                if PEER in one.timings:
                    times = ratio(one.timings[PEER], one.timings[OURS])["median"]
                    right = max(timing.median for timing in one.timings.values()) * 1e3
                    axis.annotate(
                        f"{times:.2g}×", (right, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8
                    )
            axis.set_title(here[0].which)
            axis.set_xscale("log")
            axis.set_xlabel("ms")
            axis.set_yticks(range(len(here)), [one.case.name for one in here])
            axis.margins(x=0.15)
        axes[0][0].invert_yaxis()
        axes[0][0].set_ylabel("T, E, k")
        axes[0][0].legend()
        save(figure, folder, "routing")
    return [folder / "routing.png", folder / "routing.svg"]
