"""Superposition metrics of the experts that `train_lm.py` trained, beside controls: what did training put there?

    python examples/superposition_of_a_real_moe.py            # reads runs/train_lm, writes superposition.json and .png

Features have to be known, so they are what the text consists of: byte values, and pairs of a byte with the one before
it, all that occur often enough. The direction of feature i at a layer is the mean state that the layer's experts read
on tokens of that feature, less the mean over all tokens. What expert e makes of it is

    W_i^e = (μ_i − μ) G_eᵀ      G_e (m, d): the gate half of its first matrix, so W_i^e moves the m gates

scaled so that the expert's strongest feature has norm 1: a trained network has no unit of its own, and
`features_per_dimension` counts features of norm 1. A token has exactly one byte, so `expert_specialization`, which adds
features to an input, does not apply. In its place: the share α_i^e of the tokens of feature i that expert e gets
(`expert_presence`), and the mutual information of byte and expert, beside its value for shuffled experts.

Means over features weigh the experts by α: what a feature meets where it goes. "As routed" also scales W_i^e by √α_i^e,
so that a feature which never comes to an expert does not count as interfering there; "exchanged" does so with
the shares of randomly exchanged features, as a router would that sends as many features to an expert, but not these.

Controls: `initial`, the same model before training; `random`, trained features through experts of random weights;
`dense`, a model of equal active width (k · m) trained on the same batches.

What this cannot say: whether the model computes with these directions (no intervention is made), what lies in
directions of other features, and how much is chance: it is one model and one seed. A mean state is also coarse: it
averages over everything else that a token carries.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.bench.environment import missing_extras
from moesaic.metrics import (
    effective_experts,
    expert_presence,
    expert_usage,
    feature_geometry,
    feature_norms,
    features_per_dimension,
)
from moesaic.moe import register_with_transformers

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH, which this repository asks for, leaves it out
from superposition_figure import draw

CLASSES = ("a-z", "A-Z", "0-9", "space", "newline", "other")
PER_DIMENSION = ("features_per_dimension", "features_per_dimension_as_routed")
ROOM = ("dimensionality", "dimensionality_as_routed", "dimensionality_exchanged")
Labels = dict[str, Tensor]
Found = dict[str, Any]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options; exits with code 2 where one is wrong or the model is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/train_lm"), help="of train_lm.py")
    parser.add_argument("--windows", type=int, default=512, metavar="N", help="sequences of text to measure on (512)")
    parser.add_argument("--least", type=int, default=50, metavar="N", help="tokens that make a feature (50)")
    options = parser.parse_args(argv)
    for name in ("windows", "least"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: must be at least 1, got {getattr(options, name)}")
    if missing_extras() or importlib.util.find_spec("transformers") is None:
        parser.error("needs transformers and what draws figures: pip install 'moesaic[bench,transformers]'")
    if not all((options.folder / name).exists() for name in ("curve.json", "text.txt", "initial", "model")):
        parser.error(
            f"argument folder: {options.folder} has no trained model; make one: "
            f"python examples/train_lm.py --out {options.folder}"
        )
    return options


def classes(byte: Tensor) -> Tensor:
    """The index in `CLASSES` of each byte."""
    found = torch.full_like(byte, CLASSES.index("other"))
    for name, low, high in (("a-z", 97, 122), ("A-Z", 65, 90), ("0-9", 48, 57), ("space", 32, 32), ("newline", 10, 10)):
        found[(byte >= low) & (byte <= high)] = CLASSES.index(name)
    return found


def frequent(values: Tensor, least: int) -> Tensor:
    """Number the values that occur ``least`` times or more from 0; −1 for the others."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    number = torch.where(counts >= least, (counts >= least).cumsum(0) - 1, -1)
    return number[inverse]


@torch.no_grad()
def observe(model: Any, windows: Tensor, labels: Labels) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Run the text through the model.

    Returns:
        Of each layer: directions of the features, (n, d), by set of features; chosen experts (T, k), empty if dense.
    """
    layers = model.model.layers
    sums = [{name: torch.zeros(0) for name in labels} for _ in layers]
    chosen: list[list[Tensor]] = [[] for _ in layers]
    at = 0

    def look(layer: int, states: Tensor) -> None:
        # The first byte of a window has none before it.
        x = states[:, 1:].flatten(0, 1).double()
        for name, label in labels.items():
            here = label[at : at + len(x)] + 1
            total = sums[layer][name] if at else x.new_zeros(int(label.max()) + 2, x.shape[1])
            sums[layer][name] = total.index_add_(0, here, x)
        if hasattr(layers[layer].mlp, "gate"):
            logits = x.float() @ layers[layer].mlp.gate.weight.T
            chosen[layer].append(logits.topk(model.config.num_experts_per_tok, dim=-1).indices)

    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, number=number: look(number, args[0]))
        for number, layer in enumerate(layers)
    ]
    for part in windows.split(32):
        model(input_ids=part, use_cache=False)
        at += part[:, 1:].numel()
    for hook in hooks:
        hook.remove()
    directions = []
    for found in sums:
        mean = next(iter(found.values())).sum(0) / at
        counts = {name: label[label >= 0].bincount() for name, label in labels.items()}
        directions.append({name: total[1:] / counts[name][:, None] - mean for name, total in found.items()})
    return directions, [torch.cat(ids) if ids else torch.zeros(0, 0) for ids in chosen]


def gates_of(mlp: Any) -> Tensor:
    """The gate matrices of a layer's experts, (E, m, d); of a dense MLP with E = 1."""
    if hasattr(mlp, "gate"):
        both: Tensor = mlp.experts.gate_up_proj.detach().double()
        return both[:, : both.shape[1] // 2]
    one: Tensor = mlp.gate_proj.weight.detach().double()
    return one[None]


def geometry(direction: Tensor, gates: Tensor, presence: Tensor, usage: Tensor) -> Found:
    """Metrics of W^e = direction · G_eᵀ for all experts: lists over features, weighted by presence, and means."""
    weight = direction @ gates.mT
    weight = weight / feature_norms(weight).amax(-1)[:, None, None]

    def mean(values: Tensor, share: Tensor = presence) -> Tensor:
        return (share * values.nan_to_num()).sum(0) / share.sum(0)

    def as_routed(share: Tensor) -> Tensor:
        routed = weight * share.sqrt()[..., None]
        # An expert that no listed feature comes to has no strongest one.
        return routed / feature_norms(routed).amax(-1).clamp_min(1e-300)[:, None, None]

    everything, routed = feature_geometry(weight), as_routed(presence)
    order = torch.randperm(presence.shape[1], generator=torch.Generator().manual_seed(0))
    exchanged = presence[:, order]
    return {
        "dimensionality": mean(everything.dimensionality).tolist(),
        "dimensionality_as_routed": mean(feature_geometry(routed).dimensionality).tolist(),
        "dimensionality_exchanged": mean(feature_geometry(as_routed(exchanged)).dimensionality, exchanged).tolist(),
        "superposition": float(mean(everything.superposition).mean()),
        "polysemanticity": float(mean(everything.polysemanticity).mean()),
        "monosemantic_share": float(mean(everything.monosemantic().double()).mean()),
        "features_per_dimension": float(features_per_dimension(weight, usage)),
        "features_per_dimension_as_routed": float(features_per_dimension(routed, usage)),
        "norms": everything.norm.tolist(),
    }


def information(label: Tensor, ids: Tensor, n_experts: int) -> float:
    """Bits that a token's expert tells about its label, I(label; expert), over all T·k choices."""
    kept = label >= 0
    n_labels = int(label.max()) + 1
    keys = label[kept, None] * n_experts + ids[kept]
    joint = keys.flatten().bincount(minlength=n_labels * n_experts).view(n_labels, n_experts).double()
    joint = joint / joint.sum()
    entropy = torch.special.entr
    bits = entropy(joint.sum(0)).sum() + entropy(joint.sum(1)).sum() - entropy(joint).sum()
    return float(bits) / float(torch.log(torch.tensor(2.0)))


def measure(model: Any, windows: Tensor, labels: Labels, byte_class: Tensor, *, random: bool) -> list[Found]:
    """All metrics of one model, layer by layer; ``random`` adds those of random experts on the same features."""
    directions, chosen = observe(model, windows, labels)
    generator = torch.Generator().manual_seed(0)
    layers = []
    for number, (direction, ids) in enumerate(zip(directions, chosen, strict=True)):
        gates = gates_of(model.model.layers[number].mlp)
        n_experts = len(gates)
        if not ids.numel():
            ids = torch.zeros(len(byte_class), 1, dtype=torch.int64)
        usage = expert_usage(ids, n_experts)
        layer: Found = {"usage": usage.tolist(), "effective_experts": float(effective_experts(usage))}
        shuffled = ids[torch.randperm(len(ids), generator=generator)]
        sources = {**labels, "class": byte_class}
        layer["bits"] = {name: information(label, ids, n_experts) for name, label in sources.items()}
        layer["bits_shuffled"] = {name: information(label, shuffled, n_experts) for name, label in sources.items()}
        layer["class_of_expert"] = expert_presence_of(byte_class, ids, n_experts).tolist()
        for name, label in labels.items():
            kept = label >= 0
            one_hot = torch.nn.functional.one_hot(label[kept], int(label.max()) + 1)
            presence = expert_presence(one_hot, ids[kept], n_experts)
            layer[name] = geometry(direction[name], gates, presence, usage) | {"presence": presence.tolist()}
            if random:
                drawn = torch.randn(gates.shape, generator=generator, dtype=torch.float64)
                layer[f"{name} random"] = geometry(direction[name], drawn, presence, usage)
        layers.append(layer)
    return layers


def expert_presence_of(byte_class: Tensor, ids: Tensor, n_experts: int) -> Tensor:
    """What each expert gets, by class: (E, classes), rows sum to 1 (to 0 for an expert that gets nothing)."""
    keys = byte_class[:, None] + len(CLASSES) * ids
    counts = keys.flatten().bincount(minlength=n_experts * len(CLASSES)).view(n_experts, -1).double()
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def table(models: dict[str, list[Found]]) -> str:
    """A line per layer and model."""
    heads = (
        "layer model|effective|bits on|bits on|byte|routed|exch.|super-|poly-|feat. /|routed|pair",
        "|experts|byte|class|D|D|D|position|seman.|dim|f. / d|D",
    )
    lines = [
        f"{first:17}" + "".join(f"{word:>10}" for word in rest) for first, *rest in (head.split("|") for head in heads)
    ]
    for number in range(len(models["trained"])):
        for name, layers in models.items():
            layer = layers[number]
            routing = [layer["effective_experts"], layer["bits"]["byte"], layer["bits"]["class"]]
            for suffix in ("", " random") if name == "trained" else ("",):
                byte, pair = layer[f"byte{suffix}"], layer[f"pair{suffix}"]
                cells = [average(byte[key]) for key in ROOM]
                cells += [byte[key] for key in ("superposition", "polysemanticity", *PER_DIMENSION)]
                cells += [average(pair["dimensionality"])]
                words = "".join(" " * 10 if suffix else f"{value:10.2f}" for value in routing)
                lines.append(
                    f"{number + 1:5} {suffix.strip() or name:11}" + words + "".join(f"{v:10.2f}" for v in cells)
                )
    return "\n".join(lines)


def average(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the figure and the numbers."""
    options = parse(argv)
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    register_with_transformers()
    about = json.loads((options.folder / "curve.json").read_text(encoding="utf-8"))
    length = about["options"]["length"]
    text = torch.tensor(list((options.folder / "text.txt").read_bytes())[: about["text"]["train_bytes"]])
    windows = text[: len(text) // length * length].view(-1, length)
    windows = windows[:: max(1, len(windows) // options.windows)][: options.windows]
    byte = windows[:, 1:].flatten()
    labels = {
        "byte": frequent(byte, options.least),
        "pair": frequent(windows[:, :-1].flatten() * 256 + byte, options.least),
    }
    for name, label in labels.items():
        if int(label.max()) < 1:
            raise SystemExit(f"no two {name}s occur --least = {options.least} times in {options.windows} windows")
    models = {}
    for name, folder in (("trained", "model"), ("initial", "initial"), ("dense", "dense")):
        # A folder from an earlier run may lie there.
        if name != "dense" or about["options"]["dense"]:
            model = transformers.Qwen3MoeForCausalLM.from_pretrained(options.folder / folder).eval()
            model.set_experts_implementation("moesaic")
            models[name] = measure(model, windows, labels, classes(byte), random=name == "trained")
            width = about["options"]["d_ff"]
    result = {
        "features": {name: int(label.max()) + 1 for name, label in labels.items()},
        "tokens": len(byte), "least": options.least, "expert_width": width,
        "classes": CLASSES, "class_entropy_bits": information(classes(byte), classes(byte)[:, None], len(CLASSES)),
        "trained_with": about["options"], "models": models,
    }  # fmt: skip
    (options.folder / "superposition.json").write_text(json.dumps(result), encoding="utf-8")
    draw(result, options.folder)
    n_bytes, n_pairs = result["features"]["byte"], result["features"]["pair"]
    print(f"{n_bytes} bytes, {n_pairs} pairs, experts of width {width}; D: mean dimensionality of a feature")
    print(table(models))
    print(f"results: {options.folder / 'superposition.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
