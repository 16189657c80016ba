"""A small decoder, quantized by transformers from a configuration: what a merge costs at its outputs.

    python suites/quantize/decoder.py

Adapted and merged are two models loaded from the same files, so that no forward comes before the merge. Both run in
train mode without dropout: in eval mode bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from scene import SIZE, delta, dense, show, staged
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peftcheck.budgets.grids import blocks
from peftcheck.quantizers.bitsandbytes import _sorted
from peftcheck.record import Table

LENGTHS = (1, 4, 16, 64, 256)
CONFIGURATION = dict(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512, initializer_range=0.05,
)  # fmt: skip
KINDS = {
    "none": None,
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32),
}


def loaded(folder: Path, kind: str):
    """Return the decoder, quantized as transformers does it, with a LoRA on every projection of attention."""
    options = {} if KINDS[kind] is None else {"quantization_config": KINDS[kind], "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    config = LoraConfig(
        r=8, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=True
    )
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def logits(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.double()


def lengths(folder: Path) -> Table:
    """Compare adapted and merged logits over the length of the input."""
    rows = []
    ids = torch.randint(0, 512, (4, max(LENGTHS)), generator=torch.Generator().manual_seed(2))
    for kind in KINDS:
        adapted, merged = loaded(folder, kind), loaded(folder, kind)
        merged.merge_adapter()
        row = []
        for length in LENGTHS:
            one, two = logits(adapted, ids[:, :length]), logits(merged, ids[:, :length])
            row.append(float(torch.linalg.vector_norm(one - two)))
        last = float(torch.linalg.vector_norm(one[:, -1] - two[:, -1]) / torch.linalg.vector_norm(one[:, -1]))
        first = float(torch.linalg.vector_norm(one[:, 0] - two[:, 0]) / torch.linalg.vector_norm(one[:, 0]))
        rows.append((kind, *row, first, last))
    columns = ("quantizer", *(f"norm at {n}" for n in LENGTHS), "relative, first token", "relative, last token")
    return Table(
        "adapted against merged: norm of the logits' difference over all tokens, by length", columns, tuple(rows)
    )


def theory(weight: Tensor) -> tuple[float, float]:
    """Return the root mean square error of int8 rows and of nf4 blocks for a weight, errors uniform within a step."""
    row = weight.abs().amax(1, keepdim=True) / 127
    parts, code = blocks(weight, 64), _sorted("nf4")
    scale = parts.abs().amax(1, keepdim=True)
    at = (torch.searchsorted(code, (parts / scale).contiguous(), right=True) - 1).clamp(0, 14)
    step = scale * (code[1:] - code[:-1])[at]
    return float((row.square() / 12).mean().sqrt()), float((step.square() / 12).mean().sqrt())


def factor() -> Table:
    """Compare the errors of real merges in 4 and 8 bits with what uniform errors within a step would be."""
    rows = []
    for seed in range(3):
        found, expected = [], ()
        for name in ("bitsandbytes.int8", "bitsandbytes.nf4"):
            stage = staged(name, seed)
            start, due = dense(stage), delta(stage)
            stage.attached.merge(("default",))
            found.append(float((dense(stage) - start - due).square().mean().sqrt()))
            expected = expected or theory(start + due)
        rows.append((seed, *found, found[1] / found[0], *expected, expected[1] / expected[0]))
    columns = ("seed", "int8", "nf4", "factor", "int8, theory", "nf4, theory", "factor, theory")
    return Table(
        f"rms error of a merge into {SIZE} x {SIZE} normal weights", columns, tuple(rows), "theory: step / sqrt(12)"
    )


def safety(folder: Path) -> Table:
    """Merge safely what is broken and what is merely coarse."""
    rows = []
    for kind in KINDS:
        for what in ("NaN in one factor", "a delta a tenth of the step"):
            model = loaded(folder, kind)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    with torch.no_grad():
                        if what.startswith("NaN"):
                            parameter.view(-1)[0] = math.nan
                        else:
                            parameter.mul_(0.01)
            try:
                model.merge_adapter(safe_merge=True)
                rows.append((kind, what, "accepted"))
            except ValueError as error:
                rows.append((kind, what, f"refused: {str(error)[:60]}"))
    return Table(
        "safe_merge", ("quantizer", "adapter", "verdict"), tuple(rows), "it catches catastrophes, not rounding"
    )


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LlamaForCausalLM(LlamaConfig(**CONFIGURATION)).save_pretrained(folder)
        show(factor())
        show(lengths(folder))
        show(safety(folder))


if __name__ == "__main__":
    main()
