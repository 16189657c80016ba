"""Checkpoints: what a library writes for the adapters of a case, read without the library.

Nothing is ever unpickled: values are read from safetensors, configurations from JSON; of anything else only the size is
taken.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from peftcheck import models, refusal
from peftcheck.implementation import Attached, stored
from peftcheck.stage import Stage

DESCRIPTIONS = (".json", ".md")  # text about the values, not values


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint weighs, in bytes.

    `values`: of every tensor in it; `container`: what the format adds for their names, dtypes and shapes;
    `extra`: all else in the files of values; `description`: configuration and documentation.
    """

    values: int
    container: int
    extra: int
    description: int

    @property
    def written(self) -> int:
        """The bytes of the files of values."""
        return self.values + self.container + self.extra


def folders(folder: Path, adapter: str, adapters: Sequence[str]) -> list[Path]:
    """Return the folders with an adapter's files after all were saved; the first one's are those of no adapter, too."""
    unnamed = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in adapters]
    return [stored(folder, adapter), *(unnamed if adapter == adapters[0] else ())]


def sizes(*folders: Path) -> Sizes:
    """Return what the files of one adapter weigh; folders within are those of other adapters."""
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    described = sum(path.stat().st_size for path in files if path.suffix in DESCRIPTIONS)
    values = container = written = 0
    for path in files:
        if path.suffix in DESCRIPTIONS:
            continue
        written += path.stat().st_size
        if path.suffix == ".safetensors":
            entries = header(path)
            spans = [entry["data_offsets"] for entry in entries.values()]
            values += sum(end - start for start, end in spans)
            container += overhead(entries)
    return Sizes(values, min(container, written - values), max(0, written - values - container), described)


def header(path: Path) -> dict[str, dict]:
    """Return the entries of a safetensors file: dtype, shape and data_offsets by name.

    The file opens with the header's length (eight bytes, little-endian) and the header (JSON).
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries


def overhead(entries: Mapping[str, dict]) -> int:
    """Return the bytes that safetensors needs besides the values: length, header, padding of the header to 8.

    Metadata is allowed the one entry that names the framework.
    """
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"), ensure_ascii=False)
    length = len(text.encode())
    return 8 + length + -length % 8


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors that lie in a folder, by the library's names."""
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def descriptions(folder: Path) -> dict[str, object]:
    """Return the configurations that lie in a folder, by file."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def temporary(owner: object) -> Path:
    """Return a new folder that goes when `owner` does."""
    folder = tempfile.mkdtemp(prefix="peftcheck-")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def trained(stage: Stage) -> frozenset[str]:
    """Return the roles that are trained; an adapter that was added for inference has the same ones."""
    return frozenset(role for name in stage.names for _, role in stage.attached.trainable(name))


def declared(stage: Stage, name: str, besides: bool = True) -> int:
    """Return the bytes of an adapter's trained tensors and (besides) of those that its variant declares, each once."""
    adapter = next(one for one in stage.case.adapters if one.name == name)
    roles = trained(stage) | (stage.variant.keeps(adapter) if besides else frozenset())
    held = {t.data_ptr(): t.nbytes for (_, role), t in stage.attached.adapter_tensors(name).items() if role in roles}
    return sum(held.values())


def regenerate(stage: Stage) -> None:
    """Put back what is not trained as the library made it.

    Other laws write test values into every tensor; but what follows from a seed or from the base is made anew on
    loading, or others are made from it, and would not come back with those.
    """
    roles = trained(stage)
    with torch.no_grad():
        for name in stage.names:
            now = stage.attached.adapter_tensors(name)
            for key, made in stage.fresh[name].items():
                if key[1] not in roles:
                    now[key].copy_(made)


def saved(stage: Stage, anew: bool = False) -> Path:
    """Return the folder into which the library has saved all adapters, at the start of a law and in one call.

    Written once for all laws, since it is a function of the case alone, or `anew`. Changes the stage like saving does.
    """
    if stage.written is None or anew:
        regenerate(stage)
        folder = temporary(stage)
        try:
            stage.attached.save(folder, stage.names)
            stage.written = folder
        except Exception as error:
            stage.written = error
    if isinstance(stage.written, Exception):
        raise stage.written
    return stage.written


def reloaded(stage: Stage, adapters: Sequence[str]) -> Attached:
    """Return a pristine model into which the library has loaded some of the saved adapters.

    The random state differs from that of attaching, as in another process: what is drawn anew comes out otherwise.
    """
    folder = saved(stage)
    model = models.build(stage.case)
    with torch.no_grad():
        for key, tensor in model.named_parameters(remove_duplicate=False):
            tensor.copy_(stage.pristine[key])
    torch.default_generator.manual_seed(stage.case.values ^ 0x5EED)
    return stage.implementation.reload(model, stage.case, {name: stored(folder, name) for name in adapters})


def outputs(stage: Stage, attached: Attached) -> tuple[Tensor, ...] | None:
    """Return the output of every layer of the case in a run of a model, or None where the library cannot run it.

    That it cannot is the matter of other laws.
    """

    def run() -> list[Tensor]:
        seen = stage.run(attached)
        return [seen[spec.name].y for spec in stage.case.layers]

    return tolerant(stage, run)


def tolerant(stage: Stage, run: Callable[[], Sequence[Tensor]]) -> tuple[Tensor, ...] | None:
    """Return clones of what `run` returns, or None where the library raises; an error of the harness goes on."""
    try:
        with torch.no_grad():
            return tuple(output.clone() for output in run())
    except Exception as error:
        if not refusal.is_library(error, stage.implementation):
            raise
        return None
