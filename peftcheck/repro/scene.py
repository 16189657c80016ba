"""What the bodies of scripts are written from, and what they all end with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from peftcheck import attention
from peftcheck.laws.safe_merge import Poisoned
from peftcheck.measurement import Measurement
from peftcheck.repro.model import literal
from peftcheck.spelling import Spelling
from peftcheck.stage import Stage


@dataclass(frozen=True)
class Scene:
    """What a body is written from: a fresh stage (poisoned where the law poisons), the spelling, the measurement."""

    stage: Stage
    say: Spelling
    measured: Measurement
    poisoned: Poisoned | None = None

    @property
    def site(self) -> str:
        """The layer that shows the defect, else the first that is targeted."""
        names = [spec.name for spec in self.stage.case.layers]
        head = self.measured.role.partition(":")[0]
        return next((n for n in names if n == head or head.rpartition(".")[0] == n), self.stage.targeted[0])

    @property
    def tensor(self) -> str:
        """The tensor that shows the defect, where the role names one."""
        tail = self.measured.role.partition(":")[2] or self.measured.role.rpartition(".")[2]
        return tail.split(" ")[0] or "weight"

    def merges(self) -> list[str]:
        """Return the statements that merge all adapters as the case says."""
        case, names = self.stage.case, self.stage.names
        calls = [names] if case.joint or len(names) == 1 else [(name,) for name in names]
        return [self.say.merge(own, case.safe) for own in calls]

    def current(self, tensor: str | None = None) -> str:
        """Return an expression for a clone of the base tensor in force."""
        return f"{self.say.base(self.site, tensor or self.tensor)}.detach().clone()"

    def takes(self, name: str) -> str:
        """Return an expression for the input of a layer."""
        return literal(self.stage.inputs[name])

    def runs(self, name: str, x: str | None = None) -> str:
        """Return an expression for the output of a layer on its input, or on the tensor that `x` stands for."""
        spec, given = self.stage.spec(name), x or self.takes(name)
        if spec.kind != "mha":
            return f"{self.say.layer(name)}({given})"
        targets, sources = attention.lengths(spec)
        along = attention.axis(spec, self.stage.inputs[name])
        apart = (
            f"[{given}] * 3"
            if attention.attends_to_itself(spec)
            else f"{given}.split({[targets, sources, sources]}, {along})"
        )
        mask = f", attn_mask=torch.ones({targets}, {sources}).triu(1).bool()" if spec.causal else ""
        return f"{self.say.layer(name)}(*({apart}){mask})[0]"

    def run(self) -> str:
        """Return the line that makes `run`: every layer, or the whole model, on its input."""
        if self.stage.case.whole:
            arguments = ", ".join(literal(x) for x in self.stage.arguments)
            return f"run = lambda: [y for y in model({arguments}).values() if isinstance(y, torch.Tensor)]"
        calls = ", ".join(self.runs(spec.name) for spec in self.stage.case.layers)
        return f"run = lambda: [{calls}]"


Body = Callable[[Scene], list[str] | None]


def compared(expected: str | None, allowed: Tensor | None = None) -> list[str]:
    """Return the lines that compare `found` with `expected`, elementwise against `allowed` (0 without)."""
    lines = [f"expected = {expected}"] if expected else []
    bound = "0"
    if allowed is not None and bool((allowed > 0).any()):
        lines.append(f"allowed = {literal(allowed.double())}")
        bound = "allowed"
    return [
        *lines,
        "difference = (found.double() - expected.double()).abs() if found.shape == expected.shape else torch.inf",
        'print("found:     ", tuple(found.shape), found.tolist())',
        'print("expected:  ", tuple(expected.shape), expected.tolist())',
        f'print("difference:", difference, "allowed:", {bound})',
        f"raise SystemExit(int(not torch.all(torch.as_tensor(difference <= {bound}))))",
    ]


def named(root: torch.nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, shared ones under each of their names."""
    return {
        **dict(root.named_parameters(remove_duplicate=False)),
        **dict(root.named_buffers(remove_duplicate=False)),
    }
