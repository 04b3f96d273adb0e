"""Which activation an experts module is taken to have: equal ones by name, anything else by none."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

from moesaic.kernels import reference
from moesaic.kernels.activations import GATED, PLAIN, activate, clamped_swiglu
from moesaic.moe import hf
from moesaic.moe.hf_gate import activation_name

N_EXPERTS, WIDTH, INNER = 4, 6, 5


class Experts(nn.Module):
    """What transformers' decorator makes of an experts class."""

    has_bias, is_transposed, is_concatenated, has_gate = False, True, True, True
    act_fn: Any
    gate_up_proj: nn.Parameter
    up_proj: nn.Parameter
    limit: float
    alpha: float
    shift: float

    def __init__(self, act_fn: Any = None, **constants: Any) -> None:
        super().__init__()
        columns = 2 * INNER if self.has_gate else INNER
        name = "gate_up_proj" if self.has_gate else "up_proj"
        self.register_parameter(name, nn.Parameter(torch.randn(N_EXPERTS, WIDTH, columns)))
        self.down_proj = nn.Parameter(torch.randn(N_EXPERTS, INNER, WIDTH))
        self.act_fn = act_fn or nn.SiLU()
        for constant, value in constants.items():
            setattr(self, constant, value)

    def _apply_gate(self, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        result: Tensor = self.act_fn(gate) * up
        return result

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return hf.experts_forward(self, x, ids, weights)


class Plain(Experts):
    has_gate = False


class Interleaved(Experts):
    is_concatenated = False

    def _apply_gate(self, h: Tensor) -> Tensor:
        result: Tensor = self.act_fn(h[..., 0::2]) * h[..., 1::2]
        return result


class Clamped(Experts):
    def _apply_gate(self, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        result: Tensor = (up + self.shift) * gate * torch.sigmoid(self.alpha * gate)
        return result


GPT_OSS = {"limit": 7.0, "alpha": 1.702, "shift": 1.0}


def overriding(gate: Callable[[Experts, Tensor, Tensor], Tensor]) -> type[Experts]:
    return type("Overriding", (Experts,), {"_apply_gate": lambda self, h: gate(self, *h.chunk(2, dim=-1))})


def name_of(experts: Experts) -> str | None:
    return activation_name(experts, 2 * INNER if experts.has_gate else INNER, experts.training)


@pytest.mark.parametrize("name", [name for name in GATED if name != "gpt_oss"])
@pytest.mark.parametrize("kind", [Experts, Interleaved])
def test_a_gate_has_the_name_of_its_activation(name: str, kind: type[Experts]) -> None:
    curve = {"swiglu": nn.SiLU(), "geglu": nn.GELU(), "geglu_tanh": nn.GELU("tanh"), "reglu": nn.ReLU()}[name]
    assert name_of(kind(curve)) == name


@pytest.mark.parametrize("name", PLAIN)
def test_an_activation_without_gate_has_its_name(name: str) -> None:
    assert name_of(Plain(PLAIN[name])) == name


def test_a_clamped_gate_has_the_name_of_its_constants_and_is_asked_again_when_they_change() -> None:
    experts = Clamped(**GPT_OSS)
    assert name_of(experts) == "gpt_oss"
    experts.limit = 6.0
    assert name_of(experts) == clamped_swiglu(6.0, 1.702, 1.0)
    experts.limit = 7.0
    assert name_of(experts) == "gpt_oss"
    experts.act_fn = nn.GELU()
    assert name_of(experts) == "gpt_oss"
    plain = Experts()
    assert name_of(plain) == "swiglu"
    plain.act_fn = nn.GELU()
    assert name_of(plain) == "geglu"


def swapped(_: Experts, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(up) * gate


def straight_through(_: Experts, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up + (gate - gate.detach())


def detached(_: Experts, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).detach() * up


def two_sided(_: Experts, gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(-7, 7), up.clamp(-7, 7)
    return (up + 1.0) * gate * torch.sigmoid(1.702 * gate)


def far_clamp(_: Experts, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.clamp(max=500.0)) * up


def over_rows(_: Experts, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate - gate.mean(dim=0)) * up


def in_training(experts: Experts, gate: Tensor, up: Tensor) -> Tensor:
    return F.dropout(F.silu(gate) * up, 0.01, experts.training)


def failing(_: Experts, gate: Tensor, up: Tensor) -> Tensor:
    raise RuntimeError("not on this device")


def quick(_: Experts, gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(1.702 * gate) * up


@pytest.mark.parametrize(
    "gate", [swapped, straight_through, detached, two_sided, far_clamp, over_rows, in_training, failing, quick]
)
def test_a_gate_that_differs_somewhere_has_no_name(gate: Any) -> None:
    assert name_of(overriding(gate)(**GPT_OSS).train()) is None


def test_a_gate_that_learns_or_remembers_has_no_name() -> None:
    learned = Experts()
    learned.register_parameter("alpha", nn.Parameter(torch.ones(())))
    assert name_of(learned) is None
    frozen = Experts()
    frozen.register_parameter("alpha", nn.Parameter(torch.ones(()), requires_grad=False))
    assert name_of(frozen) is None
    assert name_of(Experts(nn.PReLU(init=0.0))) is None
    kept = Experts()
    kept.register_buffer("limit", torch.ones(()))
    assert name_of(kept) is None
    outside = torch.ones((), requires_grad=True)
    assert name_of(overriding(lambda _, gate, up: F.silu(gate * outside) * up)()) is None
    for activation in (nn.LeakyReLU(1e-3), nn.Hardswish(), nn.Mish(), nn.ReLU6(), nn.Identity()):
        assert name_of(Experts(activation)) is None
        assert name_of(Plain(activation)) is None


def test_dropout_is_noticed_when_training_begins() -> None:
    experts = overriding(in_training)().eval()
    assert name_of(experts) == "swiglu"
    assert name_of(experts.train()) is None
    assert name_of(experts.eval()) == "swiglu"


def test_asking_leaves_the_random_state_and_works_in_every_mode() -> None:
    with torch.no_grad():
        assert name_of(Experts()) == "swiglu"
    with torch.inference_mode():
        assert name_of(Experts()) == "swiglu"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert name_of(Experts()) == "swiglu"
    with torch.device("meta"):
        assert name_of(Experts()) == "swiglu"
    with_dropout = overriding(in_training)().train()
    state = torch.get_rng_state()
    assert name_of(with_dropout) is None
    assert torch.equal(torch.get_rng_state(), state)


def choices() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, WIDTH, generator=generator)
    return x, torch.randint(0, N_EXPERTS + 1, (9, 2), generator=generator), torch.rand(9, 2, generator=generator)


def telling(fused: list[bool]) -> Callable[[torch.fx.GraphModule, Any], Any]:
    """A compiler that compiles nothing, and notes of each graph whether the experts are one op in it."""

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        ops = [str(node.target) for node in graph.graph.nodes]
        fused.append(any("expert_mlp" in op for op in ops))
        return graph

    return backend


@pytest.mark.parametrize(
    ("kind", "constants", "name"),
    [(Experts, {}, "swiglu"), (Interleaved, {}, "swiglu"), (Clamped, GPT_OSS, "gpt_oss"), (Plain, {}, "silu")],
)
def test_compiled_without_a_first_eager_call_it_is_one_graph_and_fused(
    kind: type[Experts], constants: dict[str, Any], name: str
) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    experts = kind(**constants)
    x, ids, weights = choices()
    fused: list[bool] = []
    with torch.no_grad():
        compiled = torch.compile(experts, backend=telling(fused), fullgraph=True)(x, ids, weights)
    assert fused == [True]
    up, upstream = experts.gate_up_proj if experts.has_gate else experts.up_proj, torch.randn(x.shape)
    leaves = [x.requires_grad_(), up, experts.down_proj, weights.requires_grad_()]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    tokens, wide_up, wide_down, wide_weights = wide
    truth = reference.expert_mlp(
        tokens, wide_up, wide_down, wide_weights, ids, activation=name, interleaved=not experts.is_concatenated
    )
    trained = torch.compile(experts, backend="aot_eager", fullgraph=True)(x, ids, weights)
    got = [compiled, trained, *torch.autograd.grad(trained, leaves, upstream)]
    expected = [truth, truth, *torch.autograd.grad(truth, wide, upstream.double())]
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine - theirs).abs().max() < 1e-5 * theirs.square().mean().sqrt()
    torch.compiler.reset()


def test_compiled_anew_when_training_begins() -> None:
    torch.compiler.reset()
    experts = overriding(in_training)().eval()
    fused: list[bool] = []
    compiled = torch.compile(experts, backend=telling(fused), fullgraph=True)
    for training in (False, True, False):
        experts.train(training)
        compiled(*choices())
    assert fused == [True, False]
    torch.compiler.reset()


def test_compiled_with_a_gate_of_its_own_it_is_one_graph_too() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    experts = overriding(two_sided)()
    x, ids, weights = choices()
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)(x, ids, weights)
    torch.testing.assert_close(compiled, experts(x, ids, weights))
    torch.compiler.reset()


@pytest.mark.parametrize("gate", [None, two_sided])
def test_a_checkpoint_that_saves_what_it_computes_sees_nothing_of_the_question(gate: Any) -> None:
    torch.manual_seed(0)
    experts = (overriding(gate) if gate else Experts)()
    x, ids, weights = choices()
    x.requires_grad_()
    policy = checkpoint.CheckpointPolicy.MUST_SAVE
    contexts = partial(checkpoint.create_selective_checkpoint_contexts, lambda *_, **__: policy)
    out = checkpoint.checkpoint(experts, x, ids, weights, use_reentrant=False, context_fn=contexts)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    (truth,) = torch.autograd.grad(experts(x, ids, weights).square().sum(), x)
    torch.testing.assert_close(gradient, truth)


def test_copies_and_pickles_hold_no_trace_of_the_question() -> None:
    experts = Clamped(**GPT_OSS)
    before = set(vars(experts))
    assert name_of(experts) == "gpt_oss"
    assert set(vars(experts)) == before
    for twin in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert name_of(twin) == "gpt_oss"
        twin.alpha = 1.0
        assert name_of(twin) == clamped_swiglu(7.0, 1.0, 1.0)


@pytest.mark.parametrize("gate", [None, two_sided])
def test_mixed_dtypes_give_the_dtype_of_the_hidden_states(gate: Any) -> None:
    torch.manual_seed(0)
    experts = (overriding(gate) if gate else Experts)()
    x, ids, weights = choices()
    truth = experts(x, ids, weights)
    half = experts.bfloat16()(x.bfloat16(), ids, weights)
    assert half.dtype == torch.bfloat16
    assert (half.float() - truth).square().mean().sqrt() < 0.02 * truth.square().mean().sqrt()
    in_float = overriding(lambda _, g, up: F.softplus(g.float()) * up.float())().bfloat16()
    assert in_float(x.bfloat16(), ids, weights).dtype == torch.bfloat16


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.filterwarnings("default")
def test_the_activations_of_transformers() -> None:
    functions = importlib.import_module("transformers.activations").ACT2FN
    names = {
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_fast": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "gelu_accurate": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
        "relu": "relu",
        "relu2": "relu2",
        "silu": "silu",
        "swish": "silu",
    }
    for key in functions:
        if key not in ("prelu", "xielu"):
            assert name_of(Plain(functions[key])) == names.get(key), key


def test_the_named_activation_is_the_one_of_the_kernels() -> None:
    h = torch.randn(3, 2 * INNER)
    torch.testing.assert_close(Clamped(**GPT_OSS)._apply_gate(h), activate(h, "gpt_oss"))
