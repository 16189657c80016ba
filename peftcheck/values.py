"""What stands in the tensors: value profiles after LAPACK's matrix types.

Every element is a function of (seed, role, coordinates) through a counter-based hash: a smaller shape keeps the
values it still has, so that shrinking a case changes one thing at a time.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from peftcheck.case import Case, LayerSpec
from peftcheck.rounding import DTYPES, precision

PROFILES: dict[str, str] = {
    "normal": "independent normal values everywhere",
    "zero": "an adapter that does nothing (declares zero effect)",
    "onehot": "one nonzero element in each adapter tensor",
    "cancelling": "base weights close to minus the delta",
    "large": "a delta far larger than the weights",
    "small": "a delta below half a unit in the last place of the weights",
    "graded": "rows of the base scaled over many orders of magnitude",
    "huge": "base weights near the overflow threshold",
    "subnormal": "base weights around the smallest normal number",
    "extreme": "scales near zero and negative, rotations badly conditioned",
    "duplicated": "every adapter holds the same values",
    "dyadic": "small multiples of a power of two: the exact regime",
}
PROFILES_OF_SEVERAL: dict[str, str] = {
    "probe": "adapters on disjoint rows and columns: their cross terms lie where nothing is due",
    "parallel": "adapters that differ by a thousandth",
}
NO_EFFECT = frozenset({"zero"})
WEIGHTS_ONLY = frozenset({"subnormal"})  # outputs fall into the subnormal range, where kernels may flush

_STRIDES = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F],
    dtype=np.uint64,
)


def _uniform(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return fp64 values in (0, 1), a hash of the key and of each element's coordinates."""
    start = np.uint64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little"))
    counter = np.full(shape, start, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for axis, extent in enumerate(shape):
            steps = np.arange(extent, dtype=np.uint64) * _STRIDES[axis]
            counter += steps.reshape((-1,) + (1,) * (len(shape) - 1 - axis))
        # the finaliser of splitmix64
        counter = (counter ^ (counter >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        counter = (counter ^ (counter >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        counter ^= counter >> np.uint64(31)
    return (counter >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54


def uniform(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return fp64 values in (0, 1)."""
    return torch.from_numpy(np.asarray(_uniform(key, shape)))


def normal(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return fp64 standard normal values (Box-Muller)."""
    radius = np.sqrt(-2.0 * np.log(_uniform(key + "|r", shape)))
    return torch.from_numpy(np.asarray(radius * np.cos(2.0 * math.pi * _uniform(key + "|t", shape))))


def _power_of_ten(exponent: Tensor) -> Tensor:
    """Return 10^exponent; torch's power rounds the last few elements of a tensor otherwise than the rest."""
    return torch.from_numpy(np.asarray(np.power(10.0, exponent.numpy())))


def whole(key: str, shape: tuple[int, ...], largest: int, density: float) -> Tensor:
    """Return integers in [-largest, largest], nonzero with probability `density`, as fp64."""
    spread = torch.from_numpy(np.asarray(_uniform(key + "|d", shape)))
    size = torch.floor(torch.from_numpy(np.asarray(_uniform(key + "|m", shape))) * largest) + 1
    sign = torch.where(torch.from_numpy(np.asarray(_uniform(key + "|s", shape))) < 0.5, -1.0, 1.0)
    return torch.where(spread < density, sign * size, torch.zeros_like(size))


def base(case: Case, spec: LayerSpec, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the values of a base tensor (weight, bias), fp64 of `shape`, to be stored in the base's dtype."""
    key = f"{case.values}|base|{spec.tied or spec.name}|{name}"
    if case.profile == "dyadic":
        return whole(key, shape, 3, 0.7)
    tensor = 0.5 * normal(key, shape)
    numbers = precision(DTYPES[case.sweep.dtype])
    if case.profile == "graded":
        span = 2.0 if case.sweep.dtype == "float16" else 6.0
        rows = uniform(key + "|rows", (shape[0],)).reshape((-1,) + (1,) * (len(shape) - 1))
        return tensor * _power_of_ten(span * (2.0 * rows - 1.0))
    if case.profile == "huge":
        # in an attention layer two of them are multiplied
        largest = math.sqrt(numbers.largest) if spec.kind == "mha" else numbers.largest
        return tensor.clamp(-2, 2) * (largest / (16 * max(spec.fan_in, 4)))
    if case.profile == "subnormal":
        return tensor * (numbers.eta * 2.0 ** (numbers.bits + 1))
    return tensor


def max_norm(case: Case, spec: LayerSpec) -> float | None:
    """Return the norm to which an embedding shortens what it looks up; None where it does not."""
    if spec.max_norm is None:
        return None
    rows = base(case, spec, "weight", spec.weight_shape).to(DTYPES[case.sweep.dtype]).double()
    return spec.max_norm * (float(torch.linalg.vector_norm(rows, dim=-1).max()) or 1.0)


def adapter(case: Case, index: int, site: str, role: str, shape: tuple[int, ...], hint: str) -> Tensor:
    """Return the values of an adapter tensor, fp64.

    `hint` says what the tensor is to the method: 'factor' (any real, zero is neutral), 'scale' (one is neutral),
    'rotation' (zero is neutral, small), 'magnitude' (positive), 'projection' (frozen, any real).
    """
    if case.profile == "duplicated":
        index = 0
    key = f"{case.values}|adapter {index}|{site}|{role}"
    if case.profile == "dyadic":
        return _dyadic(key, shape, hint)
    if hint == "scale":
        return _scales(case.profile, key, shape)
    if hint == "magnitude":
        return 0.25 + uniform(key, shape)
    if hint == "rotation":
        return _rotations(case.profile, key, shape)
    if hint == "projection":
        return 0.5 * normal(key, shape)
    if case.profile == "probe":
        return _factors(case, key, shape) * _disjoint(index, len(case.adapters), role, shape)
    if case.profile == "parallel":
        common = _factors(case, f"{case.values}|adapter|{site}|{role}", shape)
        return common + 2.0**-10 * _factors(case, key, shape)
    return _factors(case, key, shape)


def _disjoint(index: int, count: int, role: str, shape: tuple[int, ...]) -> Tensor:
    """Return ones where adapter `index` of `count` stands: its share of A's columns, of B's rows; zeros elsewhere."""
    axis = {"A": 1, "B": 0}.get(role)
    if axis is None:
        return torch.ones(shape, dtype=torch.float64)
    own = torch.arange(shape[axis]) % count == index
    return own.double().reshape([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)


def _factors(case: Case, key: str, shape: tuple[int, ...]) -> Tensor:
    tensor = 0.5 * normal(key, shape)
    half = case.sweep.dtype == "float16" or case.adapter_dtype == "float16"
    if case.profile == "zero":
        return torch.zeros_like(tensor)
    if case.profile == "onehot":
        return _onehot(key, tensor)
    if case.profile == "large":
        return tensor * (2.0**3 if half else 2.0**6)
    if case.profile == "small":
        return tensor * math.sqrt(precision(DTYPES[case.sweep.dtype]).u) / 2
    if case.profile == "subnormal":
        return tensor * (2.0**-10 if half else 2.0**-40 if case.sweep.dtype != "float64" else 2.0**-500)
    return tensor


def _scales(profile: str, key: str, shape: tuple[int, ...]) -> Tensor:
    spread = normal(key, shape)
    if profile == "zero":
        return torch.ones_like(spread)
    if profile == "onehot":
        return 1.0 + _onehot(key, spread)
    if profile == "large":
        return 16.0 * torch.sign(spread) * (1 + spread.abs())
    if profile == "small":
        return 1.0 + 2.0**-5 * spread
    if profile == "extreme":
        sign = torch.where(uniform(key + "|sign", shape) < 0.5, -1.0, 1.0)
        return sign * _power_of_ten(-3.0 * uniform(key + "|decade", shape))
    return 1.0 + 0.5 * torch.tanh(spread)


def _rotations(profile: str, key: str, shape: tuple[int, ...]) -> Tensor:
    spread = 0.25 * normal(key, shape)
    if profile == "zero":
        return torch.zeros_like(spread)
    if profile == "onehot":
        return _onehot(key, spread)
    if profile == "small":
        return spread * 2.0**-6
    if profile in ("large", "extreme"):
        return spread * 8.0
    return spread


def _onehot(key: str, tensor: Tensor) -> Tensor:
    result = torch.zeros_like(tensor)
    if tensor.numel():
        digest = int.from_bytes(hashlib.blake2b(f"{key}|at".encode(), digest_size=4).digest(), "little")
        result.view(-1)[digest % tensor.numel()] = 1.0
    return result


def _dyadic(key: str, shape: tuple[int, ...], hint: str) -> Tensor:
    if hint == "scale":
        exponent = torch.floor(3.0 * uniform(key, shape)) - 1.0
        sign = torch.where(uniform(key + "|sign", shape) < 0.5, -1.0, 1.0)
        return sign * 2.0**exponent
    if hint in ("rotation", "magnitude"):
        return torch.full(shape, 0.0 if hint == "rotation" else 1.0, dtype=torch.float64)
    return whole(key, shape, 1, 0.6)


def activations(case: Case, spec: LayerSpec, shape: tuple[int, ...]) -> Tensor:
    """Return the input of a layer, fp64 of `shape`."""
    key = f"{case.values}|input|{spec.name}"
    if case.profile == "dyadic":
        return whole(key, shape, 1, min(1.0, 4.0 / spec.fan_in))
    return normal(key, shape)


def indices(case: Case, spec: LayerSpec, shape: tuple[int, ...]) -> Tensor:
    """Return the ids that an embedding looks up, int64 of `shape`."""
    return torch.floor(uniform(f"{case.values}|input|{spec.name}", shape) * spec.n_in).long()
