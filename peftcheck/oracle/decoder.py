"""What a decoder block computes, with its bound, as Llama has it: attention and a gated network, each after a norm."""

from __future__ import annotations

import math

import torch

from peftcheck.case import LayerSpec
from peftcheck.oracle import rotary
from peftcheck.oracle.form import Base
from peftcheck.rounding import Arithmetic, Bounded

EPSILON = 1e-6
"""transformers' default of a Llama, which the models under test keep."""


def block(ar: Arithmetic, spec: LayerSpec, base: Base, x: Bounded) -> Bounded:
    """Return y + M(norm(y)), y = x + A(norm(x)), for x (batch, length, features) (Touvron et al., LLaMA, 2023, 2.2)."""
    attended = rotary.attend(ar, spec, within(base, "self_attn"), rms_norm(ar, base["input_layernorm.weight"], x))
    y = ar.add(x, attended)
    given = rms_norm(ar, base["post_attention_layernorm.weight"], y)
    gate, up = (_linear(ar, within(base, f"mlp.{name}_proj"), given) for name in ("gate", "up"))
    # x / (1 + exp(-x)): exponential, sum and quotient
    opened = ar.apply(gate, torch.nn.functional.silu, 1.1, ulps=6)
    return ar.add(y, _linear(ar, within(base, "mlp.down_proj"), ar.mul(opened, up)))


def within(base: Base, name: str) -> Base:
    """Return the tensors of a module inside, by their names in it."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in base.items() if key.startswith(f"{name}.")}


def rms_norm(ar: Arithmetic, weight: Bounded, x: Bounded) -> Bounded:
    """Return w x / sqrt(mean(x^2) + eps) over the last dimension, all but w in single precision (Zhang and Sennrich, 2019).

    However far x is off, n numbers divided by the root of their mean square are sqrt(n) at most, up to what the machine
    makes of that: n + 8 roundings of the mean, of which the root halves the error, and three more.
    """
    single = Arithmetic(ar.single)
    given = single.rounded(x)
    mean = single.scale(single.sum(single.mul(given, given), -1), 1.0 / x.value.shape[-1])
    guarded = single.add(mean, single.rounded(Bounded(torch.tensor(EPSILON, dtype=torch.float64))))
    inverse = single.div(Bounded(torch.ones((), dtype=torch.float64)), single.sqrt(guarded))
    unit = single.mul(given, inverse)
    count = x.value.shape[-1]
    most = math.sqrt(count) * (1 + single.store.gamma(count + 16)) + unit.value.abs()
    return ar.mul(weight, ar.rounded(Bounded(unit.value, torch.where(unit.bound < most, unit.bound, most))))


def _linear(ar: Arithmetic, base: Base, x: Bounded) -> Bounded:
    y = ar.matmul(x, base["weight"].map(torch.t))
    return y if "bias" not in base else ar.join(y, base["bias"])
