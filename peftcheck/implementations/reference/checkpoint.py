"""Adapters on disk: one folder each, values as safetensors, configuration as JSON. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, CONFIGURATION = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True)
class Checkpoint:
    """An adapter's configuration by site ({'rank', 'alpha', 'scale', 'options'}) and its tensors by (site, role)."""

    sites: dict[str, dict[str, Any]]
    tensors: dict[tuple[str, str], Tensor]


def save(folder: Path, adapter: str, sites: Mapping[str, dict], tensors: Mapping[tuple[str, str], Tensor]) -> None:
    """Write an adapter to `folder/adapter`: its own tensors and nothing of the base."""
    target = folder / adapter
    target.mkdir(parents=True, exist_ok=True)
    named = {f"{site}:{role}": tensor.detach().contiguous() for (site, role), tensor in tensors.items()}
    save_file(named, target / TENSORS)
    (target / CONFIGURATION).write_text(json.dumps({"sites": dict(sites)}, indent=2), encoding="utf-8")


def load(folder: Path, adapter: str) -> Checkpoint:
    """Read an adapter from `folder/adapter`, or from `folder` where that is the adapter's own.

    Raises ValueError, naming the folder, where there is none or where it is not what `save` writes.
    """
    source = folder / adapter if (folder / adapter / CONFIGURATION).is_file() else folder
    if not (source / CONFIGURATION).is_file() or not (source / TENSORS).is_file():
        raise ValueError(f"no adapter '{adapter}' in {folder}: {CONFIGURATION} and {TENSORS} are due")
    sites = json.loads((source / CONFIGURATION).read_text(encoding="utf-8")).get("sites")
    if not isinstance(sites, dict):
        raise ValueError(f"{source / CONFIGURATION} lacks the adapter's sites")
    tensors = {}
    for key, tensor in load_file(source / TENSORS).items():
        site, _, role = key.partition(":")
        tensors[site, role] = tensor
    return Checkpoint(sites, tensors)
