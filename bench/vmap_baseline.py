"""The straightforward way to train thousands of small toy models in PyTorch: ``torch.func.vmap`` over one model's step.

Written from the description of the model (arXiv 2510.23671) as the baseline of ``moesaic bench ensemble``: every expert
is computed for every sample and masked, gradients are ``torch.func.grad``'s, AdamW works on the stacked tensors:

    s = x routerᵀ;  g = softmax(s);  w_e = g_e / Σ_{j∈S} g_j for the k largest, else 0
    x' = Σ_e w_e ReLU(x W_e W_eᵀ + b_e)
    L = (1/n) Σ_f I_f mean_b (x_bf − x'_bf)² + load_balance · E Σ_e f_e P_e
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


class VmapTrainer:
    """S tied models with the ``paper`` gate, trained together in fp32 on their tensors' device.

    Where scores tie, ``torch.topk`` decides, which from E = 4 on need not be the lowest id that `train_ensemble` takes.

    Args:
        weights: ``weight`` (S, E, n, m), ``bias`` (S, E, n), ``router`` (S, E, n); copied, then updated in place.
        top_k: k.
        batch_size: B, samples per model and step.
        feature_probability: (S, n), p of each independent feature.
        importance: (S, n), I.
        lr: learning rate.
        weight_decay: of all parameters.
        load_balance: the coefficient.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        top_k: int,
        batch_size: int,
        feature_probability: Tensor,
        importance: Tensor,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        load_balance: float = 0.0,
    ) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        self.exp_avg = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}
        self.exp_avg_sq = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}
        self.top_k, self.batch_size, self.step = top_k, batch_size, 0
        self.lr, self.weight_decay, self.load_balance = lr, weight_decay, load_balance
        self.probability, self.importance = feature_probability[:, None], importance
        self._gradients = torch.func.vmap(torch.func.grad(self._loss, has_aux=True))

    def draw(self) -> Tensor:
        """Return fresh samples x (S, B, n): present with probability p, then U(0, 1), from one draw for both."""
        models, n = self.importance.shape
        u = torch.rand(models, self.batch_size, n, device=self.importance.device)
        return torch.where(u < self.probability, u / self.probability, 0.0)

    def train_step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step on x (S, B, n) and return the reconstruction and load-balance losses (S,) before it."""
        gradients, losses = self._gradients(self.weights, x, self.importance)
        self.step += 1
        size = self.lr / (1 - _BETA1**self.step)
        root = (1 - _BETA2**self.step) ** 0.5
        for name, gradient in gradients.items():
            mean = self.exp_avg[name].lerp_(gradient, 1 - _BETA1)
            square = self.exp_avg_sq[name].mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            weight = self.weights[name].mul_(1 - self.lr * self.weight_decay)
            weight.addcdiv_(mean, square.sqrt().div_(root).add_(_EPS), value=-size)
        return losses[0], losses[1]

    def train(self, steps: int) -> None:
        """Take ``steps`` steps on fresh samples."""
        for _ in range(steps):
            self.train_step(self.draw())

    def _loss(self, weights: dict[str, Tensor], x: Tensor, importance: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One model's loss on x (B, n), as vmap and grad take it."""
        weight, n_experts = weights["weight"], weights["weight"].shape[0]
        hidden = torch.einsum("bn,enm->bem", x, weight)
        decoded = torch.relu(torch.einsum("bem,enm->ben", hidden, weight) + weights["bias"])
        if n_experts == 1:
            # Nobody routes to one expert: softmax, top-k and mask would only double the baseline's time.
            out, balance = decoded[:, 0], x.new_tensor(self.load_balance)
        else:
            probs = torch.softmax(x @ weights["router"].T, dim=-1)
            chosen = torch.zeros_like(probs).scatter(-1, probs.topk(self.top_k, dim=-1).indices, 1.0)
            gate = probs * chosen
            out = torch.einsum("be,ben->bn", gate / gate.sum(-1, keepdim=True), decoded)
            load = chosen.mean(0) / self.top_k
            balance = self.load_balance * n_experts * (load * probs.mean(0)).sum()
        loss = (importance * (x - out).square()).mean()
        return loss + balance, (loss, balance)
