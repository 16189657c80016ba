"""Which quantized layers PEFT's methods merge into, and where they have to refuse."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from peftcheck.implementation import Claim, Variant
from peftcheck.quantizers import DECLARED, GRIDS

_BITSANDBYTES = frozenset(name for name in DECLARED if name.startswith("bitsandbytes."))
_DEQUANTIZED = frozenset(name for name in GRIDS if not name.startswith("quanto."))
# BEFT merges into the bias of any nn.Linear, which no grid touches: one quantizer of each library shows it.
_BIASES = frozenset({"bitsandbytes.nf4.double", "torchao.int8", "quanto.qint8"})
# By method: those with a module of their own for bitsandbytes, those that go through PEFT's quantization backends.
MERGED: dict[str, frozenset[str]] = {
    "lora": _DEQUANTIZED,
    **dict.fromkeys(("hira", "randlora", "road", "pvera"), _BITSANDBYTES),
    **dict.fromkeys(("vera", "oft", "boft", "miss", "shira"), _DEQUANTIZED),
    "beft": _BIASES,
}
_OWN = frozenset({"lora.bias", "lora.dora", "oft.cayley", "miss.bat"})  # options that quantized merges treat apart
# They train a copy of the layer, or of rows of its weight, and put it in its place: where codes hide behind the dtype of
# the weight they copy codes, and nothing can be written into the adapter.
_COPIED = {"ln_tuning": ("torchao.", "gptqmodel.", "aqlm.", "eetq."), "trainable_tokens": ("torchao.int8",)}
# "does not support lora_bias yet"
_BIAS = frozenset(name for name in DECLARED if name.startswith(("torchao.", "hqq.")))


def with_quantizers(variant: Variant) -> Variant:
    """Return the variant with what is claimed for each quantizer.

    What no module of PEFT's handles must be refused: a method that accepts any subclass of a linear layer would
    compute on the codes.
    """
    if "linear" not in variant.layers:
        return variant
    if "." in variant.name and variant.name not in _OWN:
        return variant  # merged by the same code as the method's first variant
    merged = MERGED.get(variant.name.partition(".")[0], frozenset())
    if variant.name == "lora.bias":
        merged -= _BIAS
    # in the order of DECLARED: every process must count the same cells in the same order
    named = [name for name in DECLARED if variant.name != "beft" or name in _BIASES]
    named = [name for name in named if not name.startswith(_COPIED.get(variant.name, ()))]
    claims = {name: Claim.YES if name in merged else Claim.REFUSES for name in named}
    return replace(variant, quantizers=MappingProxyType(claims))
