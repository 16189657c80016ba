"""What PEFT offers, a module per family: its methods, the options that change their arithmetic, what each claims."""

from __future__ import annotations

from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods import adalora, beft, ia3, loha, lokr, lora, vera

_FAMILIES = (lora, loha, lokr, adalora, vera, beft, ia3)
METHODS: dict[str, Method] = {method.variant.name: method for family in _FAMILIES for method in family.METHODS}
