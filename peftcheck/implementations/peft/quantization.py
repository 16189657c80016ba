"""Which quantized layers PEFT's methods merge into, and where they have to refuse."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from peftcheck.implementation import Claim, Variant
from peftcheck.quantizers import DECLARED

_BITSANDBYTES = frozenset(name for name in DECLARED if name.startswith("bitsandbytes."))
_DEQUANTIZED = frozenset(name for name in DECLARED if not name.startswith("quanto."))
# By method: those with a module of their own for bitsandbytes, those that go through PEFT's quantization backends.
MERGED: dict[str, frozenset[str]] = {
    "lora": _DEQUANTIZED,
    **dict.fromkeys(("hira", "randlora", "road", "pvera"), _BITSANDBYTES),
    **dict.fromkeys(("vera", "oft", "boft", "miss", "shira"), _DEQUANTIZED),
}
_OWN = frozenset({"lora.bias", "lora.dora", "oft.cayley", "miss.bat"})  # options that quantized merges treat apart
# They change a bias, or replace modules as a whole; Lily and Poly merge into no layer, and refuse.merge speaks of that.
_PLAIN = frozenset({"beft", "ln_tuning", "trainable_tokens", "lily", "poly"})
_BIAS = frozenset(
    {"torchao.int8"} | {name for name in DECLARED if name.startswith("hqq.")}
)  # "does not support lora_bias yet"


def with_quantizers(variant: Variant) -> Variant:
    """Return the variant with what is claimed for each quantizer.

    What no module of PEFT's handles must be refused: a method that accepts any subclass of a linear layer would
    compute on the codes.
    """
    if "linear" not in variant.layers or variant.name.partition(".")[0] in _PLAIN:
        return variant
    if "." in variant.name and variant.name not in _OWN:
        return variant  # merged by the same code as the method's first variant
    merged = MERGED.get(variant.name.partition(".")[0], frozenset())
    if variant.name == "lora.bias":
        merged -= _BIAS
    claims = {name: Claim.YES if name in merged else Claim.REFUSES for name in DECLARED}
    return replace(variant, quantizers=MappingProxyType(claims))
