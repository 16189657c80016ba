"""Faults of safe merges."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftcheck.case import Case
from peftcheck.faults.fault import REFUSALS, Fault, Operation, Port, replacing
from peftcheck.faults.tensors import copies, finite, next_up, own, write


def _names(port: Port, adapters) -> tuple[str, ...]:
    return tuple(adapters) if adapters is not None else tuple(a.name for a in port.case.adapters)


def _unsafely(port: Port, names) -> dict[str, Tensor]:
    """Return what an unsafe merge would write; merge nothing."""
    start = copies(own(port))
    port.inner.merge(names, False)
    after = copies(own(port))
    port.inner.unmerge()
    write(port, start)
    return after


def _refused(after: Callable[[Port, tuple[str, ...], Exception], None]) -> dict[str, Operation]:
    """Return a merge that calls `after(port, names, error)` where the library refuses a safe merge."""

    def merge(port: Port, adapters=None, safe=False) -> None:
        names = _names(port, adapters)
        try:
            port.inner.merge(names, safe)
        except REFUSALS as error:
            if not safe:
                raise
            after(port, names, error)

    return {"merge": merge}


def _accepting(accepts: Callable[[Port, tuple[str, ...], dict[str, Tensor]], bool]) -> dict[str, Operation]:
    """Return a merge that goes through all the same where `accepts(port, names, merged tensors)`."""

    def after(port: Port, names, error: Exception) -> None:
        if not accepts(port, names, _unsafely(port, names)):
            raise error
        port.inner.merge(names, False)

    return _refused(after)


def _only_bias_bad(port: Port, names, after: dict[str, Tensor]) -> bool:
    return all(finite(tensor) for key, tensor in after.items() if key.endswith(".weight"))


def _only_infinite(port: Port, names, after: dict[str, Tensor]) -> bool:
    return not any(bool(torch.isnan(tensor).any()) for tensor in after.values())


def _only_nan(port: Port, names, after: dict[str, Tensor]) -> bool:
    return not any(bool(torch.isinf(tensor).any()) for tensor in after.values())


def _finite_before_cast(port: Port, names, after: dict[str, Tensor]) -> bool:
    return all(finite(tensor) for name in names for tensor in port.inner.adapter_tensors(name).values())


def _weight_written(port: Port, names, error: Exception) -> None:
    after = _unsafely(port, names)
    bad = {key.rpartition(".")[0] for key, tensor in after.items() if not finite(tensor)}
    write(port, {f"{site}.weight": after[f"{site}.weight"] for site in bad})
    raise error


def _half_written(port: Port, names, error: Exception) -> None:
    after = _unsafely(port, names)
    bad = {key.rpartition(".")[0] for key, tensor in after.items() if not finite(tensor)}
    write(port, {key: tensor for key, tensor in after.items() if key.rpartition(".")[0] not in bad})
    raise error


def _marked(port: Port, names, error: Exception) -> None:
    port.notes["marked"] = names
    raise error


def _merged_with_marks(port: Port) -> dict[str, tuple[str, ...]]:
    found = port.inner.merged()
    for name in port.notes.get("marked", ()):
        for site in port.inner.sites(name):
            found[site] = (*found.get(site, ()), name)
    return found


def _without_name(port: Port, names, error: Exception) -> None:
    raise ValueError("NaN found in the merged weights") from error


def _other_path(port: Port, adapters=None, safe=False) -> None:
    start = copies(own(port, "weight"))
    port.inner.merge(adapters, safe)
    if safe:
        for key, tensor in own(port, "weight").items():
            if not torch.equal(tensor, start[key]):
                next_up(tensor)


def _too_careful(port: Port, adapters=None, safe=False) -> None:
    for name in _names(port, adapters) if safe else ():
        for (site, role), tensor in port.inner.adapter_tensors(name).items():
            if bool((tensor.abs() > 8).any()):
                raise ValueError(f"adapter '{name}' on '{site}': {role} is too large to merge safely")
    port.inner.merge(adapters, safe)


def _poisoned(*kinds: str) -> Callable[[Case], bool]:
    return lambda case: case.poison.value in kinds


def _poisoned_half(case: Case) -> bool:
    return case.poison.value in ("nan", "inf", "-inf") and len(set(case.adapters[0].targets)) > 1


_BAD = _poisoned("nan", "inf", "-inf")

FAULTS = (
    Fault(
        "safe_merge.unchecked",
        "a safe merge checks nothing",
        "huggingface/peft#3682: BOFT on Conv2d",
        ("safe_merge.rejects",),
        replacing(merge=lambda port, adapters=None, safe=False: port.inner.merge(adapters, False)),
        suits=_BAD,
    ),
    Fault(
        "safe_merge.forgets-bias",
        "a safe merge checks the weight and not the bias",
        "huggingface/peft#3694: (IA)^3 merged a non-finite bias",
        ("safe_merge.rejects",),
        replacing(**_accepting(_only_bias_bad)),
        variants=("lora.bias",),
        layers=("linear", "conv1d-transformers"),
        suits=lambda case: _BAD(case) and case.poison.tensor % 3 == 2,  # of A, B and B's bias, in this order
    ),
    Fault(
        "safe_merge.infinity",
        "a safe merge looks for NaN, and infinity passes",
        "huggingface/peft#1001: the error message still speaks of NaN alone",
        ("safe_merge.rejects",),
        replacing(**_accepting(_only_infinite)),
        layers=("linear", "conv2d"),
        suits=lambda case: case.poison.value in ("inf", "-inf") and case.profile == "normal",
        exact=False,
    ),
    Fault(
        "safe_merge.nan",
        "a safe merge compares with the largest number, and NaN passes every comparison",
        "LAPACK's testing: ratio >= threshold is false of NaN",
        ("safe_merge.rejects",),
        replacing(**_accepting(_only_nan)),
        suits=_poisoned("nan"),
    ),
    Fault(
        "safe_merge.before-cast",
        "a safe merge checks the delta in the adapter's dtype: it overflows in the cast to the base's",
        "huggingface/peft#3779: a check before the value that is stored was made",
        ("safe_merge.rejects",),
        replacing(**_accepting(_finite_before_cast)),
        layers=("linear", "conv2d"),
        dtypes=("float16", "bfloat16"),
        suits=lambda case: case.poison.value == "overflow" and case.adapter_dtype == "float32",
    ),
    Fault(
        "safe_merge.writes-weight",
        "a refused merge has already written the weight",
        "huggingface/peft#3611, #3689, #3705: the weight was assigned before the bias was checked",
        ("safe_merge.atomic", "safe_merge.all_or_nothing"),
        replacing(**_refused(_weight_written)),
        suits=_BAD,
    ),
    Fault(
        "safe_merge.marks",
        "a refused merge is marked as merged",
        "order of statements, a standard mutation operator",
        ("safe_merge.atomic", "safe_merge.all_or_nothing"),
        replacing(merged=_merged_with_marks, **_refused(_marked)),
        suits=_BAD,
    ),
    Fault(
        "safe_merge.half-model",
        "the layers beside the poisoned one stay merged after a refusal",
        "huggingface/peft 0.21.2: merge_adapter checks and writes layer by layer",
        ("safe_merge.all_or_nothing",),
        replacing(**_refused(_half_written)),
        layers=("linear", "conv1d"),
        suits=_poisoned_half,
    ),
    Fault(
        "safe_merge.nameless",
        "the error does not say which adapter is broken",
        "string replacement, a standard mutation operator",
        ("safe_merge.names",),
        replacing(**_refused(_without_name)),
        suits=_BAD,
    ),
    Fault(
        "safe_merge.other-path",
        "the safe path gives another weight than the unsafe one, by one unit in the last place",
        "huggingface/peft#3611: two code paths for one formula",
        ("safe_merge.agrees",),
        replacing(merge=_other_path),
        layers=("linear", "conv2d", "embedding"),
        exact=True,
    ),
    Fault(
        "safe_merge.too-careful",
        "a safe merge refuses large values whose merge is finite",
        "replacement of a constant, a standard mutation operator",
        ("safe_merge.rejects",),
        replacing(merge=_too_careful),
        layers=("linear", "conv2d"),
        suits=_poisoned("tame"),
    ),
)
