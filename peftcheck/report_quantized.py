"""The part of a report on merging into quantized weights: what the grid costs, what the merge cost, what to do.

A pure function of the record; what comes from it is escaped where it is rendered.
"""

from __future__ import annotations

from peftcheck.record import QuantizedRecord, Record, Table

TITLE = "Merging into quantized weights"
LEAD = (
    "A merge rounds the changed weight to the quantizer's grid. Below: what that costs on the average at least, what "
    "this library's merge cost, and what is left of a change a tenth of the grid's step. All are root mean squares over "
    "the elements of one 64 x 256 layer of normal weights in float32 (block or group of 64), relative to the weights."
)
COLUMNS = (
    "quantizer",
    "method",
    "step / weight",
    "unavoidable / weight",
    "merge error / weight",
    "merge error / unavoidable",
    "small change kept",
    "its direction (cosine)",
    "codes moved",
    "keep apart below",
)
NOTE = (
    "keep apart below: the change of a weight, relative to its size, under which the merge's error exceeds a tenth of "
    "the change. Where an adapter changes weights by less, serve it unmerged, or merge into the unquantized weights and "
    "quantize once. A small change kept at 1 with a low cosine is kept on the average only: few codes move, each by a "
    "whole step."
)
CLEAR, TOLERABLE = 1.25, 0.1  # of the unavoidable error: above, the library adds its own; of the change: merge error


def table(record: Record) -> Table | None:
    """Return the figures for each quantizer and method; None where the record has none."""
    rows = tuple(_row(one) for one in sorted(record.quantized, key=lambda one: (one.quantizer, one.cost, one.variant)))
    return Table(TITLE, COLUMNS, rows, NOTE) if rows else None


def _row(one: QuantizedRecord) -> tuple[str | float | None, ...]:
    ratio = over(one.cost, one.unavoidable)
    return (
        one.quantizer,
        one.variant,
        over(one.step, one.weight),
        over(one.unavoidable, one.weight),
        over(one.cost, one.weight),
        ratio,
        one.kept,
        one.cosine,
        one.changed,
        over(one.cost / TOLERABLE, one.weight),
    )


def over(part: float, whole: float) -> float | None:
    """Return part / whole; None where there is no whole."""
    return part / whole if whole else None


def sentences(record: Record) -> tuple[str, ...]:
    """Return what the figures mean, a sentence for each quantizer, and one for each merge that adds an error of its own."""
    found = []
    for name in dict.fromkeys(sorted(one.quantizer for one in record.quantized)):
        own = [one for one in record.quantized if one.quantizer == name]
        fair = [one for one in own if one.cost <= CLEAR * one.unavoidable]
        best = min(fair or own, key=lambda one: one.cost)
        share = over(best.cost, best.weight) or 0.0
        limit = share / TOLERABLE
        kept = [one.cosine for one in fair if one.cosine is not None]
        text = f"{name}: a merge moves every weight by about {100 * share:.2g} % of its size, whatever the adapter does; "
        text += f"keep adapters that change weights by less than {100 * limit:.2g} % of their size separate."
        if kept:
            text += f" Of a change a tenth of the step a merge keeps the direction to {sum(kept) / len(kept):.2f} (cosine)."
        found.append(text)
        for one in sorted(own, key=lambda one: one.variant):
            if one.cost > CLEAR * one.unavoidable:
                times = over(one.cost, one.unavoidable)
                worse = "beyond any measure" if times is None else f"{times:.3g} times"
                found.append(f"{name}, {one.variant}: the merge errs {worse} what the grid makes unavoidable.")
    return tuple(found)
