"""What PEFT offers, a module per family: its methods, the options that change their arithmetic, what each claims."""

from __future__ import annotations

from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods import (
    adalora,
    beft,
    boft,
    c3a,
    fourierft,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    oft,
    pvera,
    randlora,
    shira,
    supertuning,
    trainable_tokens,
    unilora,
    vblora,
    vera,
    waveft,
)

_FAMILIES = (
    lora,
    loha,
    lokr,
    adalora,
    vera,
    beft,
    ia3,
    oft,
    boft,
    hra,
    randlora,
    pvera,
    vblora,
    unilora,
    shira,
    supertuning,
    trainable_tokens,
    ln_tuning,
    fourierft,
    waveft,
    c3a,
)
METHODS: dict[str, Method] = {method.variant.name: method for family in _FAMILIES for method in family.METHODS}
