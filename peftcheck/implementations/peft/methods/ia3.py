"""(IA)^3 in PEFT, gating outputs or, in the feed-forward role, inputs."""

from __future__ import annotations

from peft import IA3Config

from peftcheck.case import AdapterSpec
from peftcheck.implementation import Variant
from peftcheck.implementations.peft.method import Method, no_delta
from peftcheck.implementations.peft.methods import combinations


def _config(adapter: AdapterSpec, targets: list[str]) -> IA3Config:
    return IA3Config(target_modules=targets, feedforward_modules=targets if adapter.option("feedforward") else [])


def _method(name: str, feedforward: bool) -> Method:
    variant = Variant(
        name,
        "ia3",
        frozenset({"linear", "conv1d-transformers", "conv2d", "conv3d"}),
        options={"feedforward": (feedforward,)},
        claim=no_delta,
        documented=("ia3.epsilon",),
        combinations=combinations.IA3,
    )
    return Method(variant, _config, {"ia3_l": "scale"})


METHODS = (_method("ia3", False), _method("ia3.feedforward", True))
