"""Implementations that crash the interpreter, hang, raise at attach, or break the harness: the reference made hostile."""

from __future__ import annotations

import os
import time
from pathlib import Path

from peftcheck.implementations.reference import Reference


class _Hostile(Reference):
    """The reference, with something evil in its merge on one variant and layer kind."""

    folders = (*Reference.folders, Path(__file__).parent)

    def attach(self, model, case):
        attached = super().attach(model, case)
        if (case.sweep.variant, case.sweep.layer, case.sweep.dtype) == ("lora", "linear", "float32"):
            self.spoil(attached)
        return attached


class Crashing(_Hostile):
    name = "crashing"

    def spoil(self, attached) -> None:
        attached.unmerge = lambda: os._exit(11)


class Hanging(_Hostile):
    name = "hanging"

    def spoil(self, attached) -> None:
        attached.unmerge = lambda: time.sleep(3600)


class Refusing(_Hostile):
    name = "refusing"

    def spoil(self, attached) -> None:
        raise RuntimeError("this library is broken at attach")


CALLS = [0]


def _wear(module, args, output):
    """Add a little more at each call, and remember it where no memento reaches."""
    CALLS[0] += 1
    return output + CALLS[0]


class Leaking(_Hostile):
    """Lets state leak out of the object graph: the canary must notice."""

    name = "leaking"

    def spoil(self, attached) -> None:
        for adapter in attached.adapters():
            for site in attached.sites(adapter):
                attached.layer(site).register_forward_hook(_wear)
