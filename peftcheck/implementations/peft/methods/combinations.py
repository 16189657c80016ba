"""Which weighted combinations PEFT offers, and what its documentation promises of each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from peftcheck.implementation import Promise

LORA: Mapping[str, Promise] = MappingProxyType({
    "linear": Promise.EXACT,  # documented as "a very rough approximation": known, with the share of the cross terms
    "cat": Promise.EXACT,
    "svd": Promise.BEST_RANK,
    "ties": Promise.UNSPECIFIED,
    "ties_svd": Promise.UNSPECIFIED,
    "dare_linear": Promise.UNSPECIFIED,
    "dare_linear_svd": Promise.UNSPECIFIED,
    "dare_ties": Promise.UNSPECIFIED,
    "dare_ties_svd": Promise.UNSPECIFIED,
    "magnitude_prune": Promise.UNSPECIFIED,
    "magnitude_prune_svd": Promise.UNSPECIFIED,
})  # fmt: skip

STARTS: Mapping[str, Promise] = MappingProxyType({kind: LORA[kind] for kind in ("linear", "cat", "svd")})
"""Of LoRAs that start otherwise: the kinds that prune share their code with these."""

DORA: Mapping[str, Promise] = MappingProxyType(dict.fromkeys(LORA, Promise.UNSPECIFIED))
"""A sum of normalized changes is no such change in general; one adapter at weight 1 is."""

IA3: Mapping[str, Promise] = MappingProxyType({"linear": Promise.EXACT})
