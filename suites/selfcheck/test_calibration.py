"""Calibration: passes on this machine, and does not where a kernel is not what the budgets assume."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftcheck import calibration, engine, session
from peftcheck.calibration import KERNELS, calibrate
from peftcheck.errors import HarnessError
from peftcheck.rounding import DTYPES
from peftcheck.suite import Filters

HALF = (torch.bfloat16, torch.float16)


def test_this_machine_is_as_the_budgets_assume():
    with engine.pinned():
        found = calibrate()
    assert json.loads(json.dumps(found)) == found
    assert found["fan_in"] == 4096
    assert set(found["accumulation"]) == {*KERNELS, "norm"}
    for worst in (*found["accumulation"].values(), found["elementwise"]):
        assert set(worst) == set(DTYPES)
        assert all(0 <= ratio <= 1 for ratio in worst.values())
    # half precision rounds to store: a judge that saw nothing of that would not be one
    assert min(found["accumulation"]["linear"][dtype] for dtype in ("bfloat16", "float16")) > 0.25
    assert min(found["elementwise"].values()) > 0.5


def test_a_run_calibrates_under_the_pins_that_it_judges_under(monkeypatch):
    seen = []
    monkeypatch.setattr(session, "calibrate", lambda: {"seen": seen.append(pins())})
    filters = Filters(law=("merge.oracle",), variant=("lora",), layer=("linear",), dtype=("float32",))
    one = session.Session(session.Settings("peftcheck.implementations.reference:Reference", filters=filters))
    assert one.verdict(one.cells[0]).status == "pass"
    with engine.pinned():
        assert seen == [pins()]


def pins() -> tuple:
    return torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_deterministic_debug_mode()


def test_calibration_is_a_function_of_the_machine_alone():
    torch.manual_seed(1)
    with engine.pinned():
        first = calibrate((64,))
        state = torch.random.get_rng_state()
        assert calibrate((64,)) == first
        assert torch.equal(torch.random.get_rng_state(), state)


def sums_in_storage(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(len(x), len(w), dtype=x.dtype)
    for index in range(x.shape[1]):
        total = total + x[:, index, None] * w[None, :, index]
    return total + b


def rounds_the_products(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return ((x[:, None] * w).float().sum(-1) + b).to(x.dtype)


def stores_blocks(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    blocks = [F.linear(x[:, i : i + 32], w[:, i : i + 32]) for i in range(0, x.shape[1], 32)]
    return torch.stack(blocks).sum(0) + b


def multiplies_in_bf16(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (F.linear(x.bfloat16().float(), w.bfloat16().float()) + b).to(x.dtype)


def drops_the_last_product(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x[:, :-1], w[:, :-1], b)


def tensor_float(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    def cut(t: Tensor) -> Tensor:  # ten bits after the point, as TF32 keeps
        return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)

    return F.linear(cut(x), cut(w), b)


def single(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x.float(), w.float(), b.float()).to(x.dtype)


@pytest.mark.parametrize(
    ("kernel", "dtypes"),
    [
        (sums_in_storage, HALF),
        (rounds_the_products, HALF),
        (stores_blocks, HALF),
        (multiplies_in_bf16, (torch.float16, torch.float32, torch.float64)),
        (tensor_float, (torch.float32,)),
        (single, (torch.float64,)),
        (drops_the_last_product, tuple(DTYPES.values())),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_kernel_that_does_otherwise_is_refused(monkeypatch, kernel, dtypes):
    _, rows, shape = KERNELS["linear"]
    for dtype in dtypes:

        def run(x: Tensor, w: Tensor, b: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return kernel(x, w, b) if x.dtype == dtype else F.linear(x, w, b)

        monkeypatch.setattr(calibration, "KERNELS", {"linear": (run, rows, shape)})
        with pytest.raises(HarnessError, match=f"linear in {str(dtype).removeprefix('torch.')}"):
            calibrate((64, 512))


def test_a_flushed_subnormal_is_refused():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        with pytest.raises(HarnessError):
            calibrate((64,))
    finally:
        torch.set_flush_denormal(False)
