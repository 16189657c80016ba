"""OFT in PEFT: the Cayley transform by solving or by a Neumann series, constrained, shared blocks."""

from __future__ import annotations

from dataclasses import replace

from peft import OFTConfig

from peftcheck.case import AdapterSpec, LayerSpec
from peftcheck.implementation import Variant
from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods.boft import claim, plain

_LAYERS = frozenset({"linear", "conv2d", "embedding", "embedding.scaled"})
ROLES = {"oft_R.weight": "R", "oft_embedding_R.weight": "R"}


def _config(adapter: AdapterSpec, targets: list[str]) -> OFTConfig:
    by_count = adapter.option("given") == "r"
    return OFTConfig(
        r=adapter.rank if by_count else 0,
        oft_block_size=0 if by_count else adapter.rank,
        target_modules=targets,
        coft=adapter.option("coft", False),
        eps=adapter.option("eps", 6e-5),
        block_share=adapter.option("share", False),
        use_cayley_neumann=adapter.option("neumann"),
        num_cayley_neumann_terms=adapter.option("terms", 5),
    )


def undilated(layer: LayerSpec) -> LayerSpec:
    """OFT declares that it adapts no dilated convolution."""
    return replace(layer, dilation=(1,) * len(layer.kernel)) if layer.kernel else layer


def _method(name: str, layers=tuple(_LAYERS), admit=plain, **options) -> Method:
    choices = {"given": ("r", "size"), "share": (False, False, True), **options}
    variant = Variant(
        name,
        "oft",
        frozenset(layers),
        options=choices,
        admit=admit,
        claim=claim,
        unasked=_LAYERS - set(layers),  # `oft.cayley` asks them
        # the series truncated after Q^4 is singular at a unit entry, outside its radius of convergence
        avoids=frozenset({"onehot"}) if True in options["neumann"] else frozenset(),
    )
    return Method(variant, _config, ROLES)


METHODS = (
    _method("oft.cayley", neumann=(False,)),
    _method("oft.neumann", neumann=(True,), terms=(5, 5, 4, 6, 8)),
    _method("oft.neumann.few", neumann=(True,), terms=(2, 3)),
    _method("oft.constrained", neumann=(False, True), terms=(5,), coft=(True,), eps=(6e-5, 0.01, 1.0)),
    _method("oft.conv2d", ("conv2d",), undilated, neumann=(False,)),
)
