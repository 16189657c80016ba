"""What PEFT offers, a module per family: its methods, the options that change their arithmetic, what each claims."""

from __future__ import annotations

from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods import adalora, beft, boft, hra, ia3, loha, lokr, lora, oft, vera

_FAMILIES = (lora, loha, lokr, adalora, vera, beft, ia3, oft, boft, hra)
METHODS: dict[str, Method] = {method.variant.name: method for family in _FAMILIES for method in family.METHODS}
