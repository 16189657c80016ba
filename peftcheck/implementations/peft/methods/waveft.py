"""WaveFT in PEFT, with its wavelet transform and without."""

from __future__ import annotations

from peft import WaveFTConfig

from peftcheck.case import AdapterSpec
from peftcheck.implementation import Variant
from peftcheck.implementations.peft.method import Method
from peftcheck.implementations.peft.methods.fourierft import claim, entries


def _config(adapter: AdapterSpec, targets: list[str]) -> WaveFTConfig:
    return WaveFTConfig(
        n_frequency=adapter.rank,
        scaling=adapter.alpha,
        random_loc_seed=adapter.option("seed"),
        wavelet_family=adapter.option("wavelet", "db1"),
        use_idwt=adapter.option("wavelet") is not None,
        target_modules=targets,
    )


def _method(name: str, **options) -> Method:
    variant = Variant(
        name,
        name,
        frozenset({"linear", "conv1d-transformers"}),
        options={"seed": (777, 0), "times": (1, 3, 20), **options},
        fit=entries,
        claim=claim,
    )
    return Method(variant, _config, {"waveft_spectrum": "spectrum", "waveft_indices": "entries"})


METHODS = (_method("waveft", wavelet=("db1", "db1", "db2")), _method("waveft.direct"))
