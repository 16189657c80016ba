"""What PEFT offers, a module per family: its methods, the options that change their arithmetic, what each claims."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods.variations import variations
from peftcheck.implementations.peft.training import trained

_FAMILIES = (
    "lora",
    "lora_inits",
    "lora_variants",
    "lora_parameters",
    "lora_activated",
    "lora_ga",
    "lora_arrow",
    "loha",
    "lokr",
    "adalora",
    "vera",
    "beft",
    "ia3",
    "oft",
    "boft",
    "hra",
    "randlora",
    "pvera",
    "vblora",
    "unilora",
    "shira",
    "supertuning",
    "trainable_tokens",
    "ln_tuning",
    "fourierft",
    "waveft",
    "c3a",
    "road",
    "glora",
    "hira",
    "gralora",
    "frod",
    "tinylora",
    "peanut",
    "osf",
    "miss",
    "psoft",
    "delora",
    "deft",
    "adamss",
    "lily",
    "poly",
    "adaption_prompt",
    "xlora",
    "shadow",
    "mixed",
)


def _family(name: str) -> ModuleType | None:
    """Return a family's module, or None where the installed PEFT is older than the method.

    Only a name that PEFT itself does not have yet counts as that; any other import error is one.
    """
    try:
        return import_module(f"{__name__}.{name}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "peft":
            return None
        raise


METHODS: dict[str, Method] = {
    method.variant.name: method
    for family in map(_family, _FAMILIES)
    if family is not None
    for method in map(trained, family.METHODS)
}
METHODS |= {method.variant.name: method for method in variations(METHODS)}
