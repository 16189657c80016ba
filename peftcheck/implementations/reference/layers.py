"""What an adapter must know of the layer it stands on: its kind, its sizes, how it stores its weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


@dataclass(frozen=True)
class Geometry:
    """A layer as adapters see it.

    `kind`: 'linear', 'transposed' (weight stored as (in, out)), 'convolution' or 'embedding'. `n_in` and `n_out` are
    features, channels, or entries and dimension. `kernel` is empty but for convolutions. `factor`, a tensor of
    one element, is what a scaled embedding multiplies its rows by.
    """

    kind: str
    n_in: int
    n_out: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    factor: Tensor | None = None


def geometry(site: str, layer: nn.Module) -> Geometry:
    """Return the geometry of a layer.

    Raises TypeError, naming the layer, for every kind that is not adapted here: a subclass with a forward of its own
    would not do what the adapter's path assumes.
    """
    if isinstance(layer, nn.Linear):
        return Geometry("linear", layer.in_features, layer.out_features)
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):  # transformers' linear map in GPT-2
        return Geometry("transposed", *layer.weight.shape)
    for convolution in CONVOLUTIONS:
        if isinstance(layer, convolution) and not layer.transposed:
            return Geometry("convolution", layer.in_channels, layer.out_channels, layer.kernel_size, layer.groups)
    if isinstance(layer, nn.Embedding):
        factor = getattr(layer, "embed_scale", None)
        if factor is not None or type(layer).forward is nn.Embedding.forward:
            return Geometry("embedding", layer.num_embeddings, layer.embedding_dim, factor=factor)
    raise TypeError(f"cannot adapt '{site}': a {type(layer).__name__} is not supported")


def convolve(layer: nn.Module, x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve x with another kernel of the layer's extent: its stride, padding, mode and dilation; no groups."""
    function = next(f for kind, f in CONVOLUTIONS.items() if isinstance(layer, kind))
    if layer.padding_mode == "zeros":
        return function(x, kernel, None, layer.stride, layer.padding, layer.dilation)
    pads = [width for axis in reversed(range(len(layer.kernel_size))) for width in _widths(layer, axis)]
    return function(F.pad(x, pads, mode=layer.padding_mode), kernel, None, layer.stride, 0, layer.dilation)


def _widths(layer: nn.Module, axis: int) -> tuple[int, int]:
    """Return how far an axis is padded before and after; an odd total has its larger half after."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        return total // 2, total - total // 2
    return layer.padding[axis], layer.padding[axis]


def mix_channels(layer: nn.Module, x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve with a kernel (out, channels / groups, 1, ...): a matrix on the channels of each group."""
    function = next(f for kind, f in CONVOLUTIONS.items() if isinstance(layer, kind))
    return function(x, kernel, groups=layer.groups)


def per_output(g: Geometry, vector: Tensor) -> Tensor:
    """Shape a vector over outputs so that it multiplies the layer's output."""
    return vector.reshape(-1, *(1,) * len(g.kernel))


def per_input(g: Geometry, vector: Tensor) -> Tensor:
    """Shape a vector over inputs so that it multiplies the layer's input."""
    return vector.reshape(-1, *(1,) * len(g.kernel))


def rows(g: Geometry, vector: Tensor) -> Tensor:
    """Shape a vector over outputs so that it multiplies the stored weight."""
    if g.kind in ("transposed", "embedding"):
        return vector.reshape(1, -1)
    return vector.reshape(-1, 1, *(1,) * len(g.kernel))


def columns(g: Geometry, vector: Tensor) -> Tensor:
    """Shape a vector over inputs so that it multiplies the stored weight.

    Output channel o of a grouped convolution sees the inputs of group o // (n_out / groups) alone.
    """
    if g.kind == "transposed":
        return vector.reshape(-1, 1)
    if g.kind == "linear":
        return vector.reshape(1, -1)
    group = torch.arange(g.n_out, device=vector.device) // (g.n_out // g.groups)
    return vector.reshape(g.groups, -1)[group].reshape(g.n_out, -1, *(1,) * len(g.kernel))
