"""The part of a report on merging into quantized weights: what the grid costs, what the merge cost, what to do.

A pure function of the record; what comes from it is escaped where it is rendered.
"""

from __future__ import annotations

from peftcheck.record import QuantizedRecord, Record, Table

TITLE = "Merging into quantized weights"
LEAD = (
    "A merge rounds the changed weight to the quantizer's grid. Below: what that costs on the average at least, what "
    "this library's merge cost, what is left of a change a tenth of the grid's step, and how far ten merges and "
    "unmerges move the weights, of a full change and of none. All are root mean squares over the elements of one "
    "64 x 256 layer of normal weights in float32 (block or group of 64), relative to the weights."
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
    "ten round trips / weight",
    "ten of nothing / weight",
    "keep apart below",
)
NOTE = (
    "keep apart below: the change of a weight, relative to its size, under which the merge's error exceeds a tenth of "
    "the change. Where an adapter changes weights by less, serve it unmerged, or merge into the unquantized weights and "
    "quantize once. A small change kept at 1 with a low cosine is kept on the average only: few codes move, each by a "
    "whole step."
)
CLEAR, TOLERABLE = 1.25, 0.1  # of the unavoidable error: above, the library adds its own; of the change: merge error
STILL = 0.1  # of the unavoidable error: a grid that moves by less when nothing is merged stays where it is


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
        None if one.drift is None else over(one.drift, one.weight),
        None if one.idle is None else over(one.idle, one.weight),
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
        text = (
            f"{name}: a merge moves every weight by about {100 * share:.2g} % of its size, whatever the adapter does; "
        )
        text += f"keep adapters that change weights by less than {100 * limit:.2g} % of their size separate."
        if kept:
            text += (
                f" Of a change a tenth of the step a merge keeps the direction to {sum(kept) / len(kept):.2f} (cosine)."
            )
        found.append(text + _drifts(fair or own))
        for one in sorted(own, key=lambda one: one.variant):
            if one.cost > CLEAR * one.unavoidable:
                times = over(one.cost, one.unavoidable)
                worse = "beyond any measure" if times is None else f"{times:.3g} times"
                found.append(f"{name}, {one.variant}: the merge errs {worse} what the grid makes unavoidable.")
    return tuple(found)


def _drifts(rows: list[QuantizedRecord]) -> str:
    """Return what ten merges and unmerges do to the weights; of several methods, of the one that moves them least."""
    text = ""
    moved = [one for one in rows if one.drift is not None and one.weight]
    if moved:
        share = min(one.drift / one.weight for one in moved)
        text += f" Merged and taken out ten times, the weights are {100 * share:.2g} % off."
    idle = [one for one in rows if one.idle is not None and one.weight]
    if idle:
        least = min(idle, key=lambda one: one.idle / one.weight)
        if least.idle > STILL * least.unavoidable:
            share = 100 * least.idle / least.weight
            text += f" This grid walks away by itself: {share:.2g} % after ten merges of nothing."
        else:
            text += " Merges of nothing leave them where they are."
    return text
