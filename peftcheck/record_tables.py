"""Say once in a record's JSON what many of its cells share: their worst cases, and their messages.

All laws of a sweep walk the same cases, and a token is a case and a law. So the JSON has a table `cases` of tokens
without law, and a table `messages`; cells point into both by index, defects into the first. `fold` and `unfold` turn
the plain form, in which every cell and defect holds its own token, words and message, into that one and back. What does
not fit a table is spelled out in its place, and so nothing is lost: a token of another law than the cell's, of no case,
or one that is not spelled as `tokens.pack` does it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from peftcheck import tokens
from peftcheck.dataclass_json import Mismatch, decode


@dataclass(frozen=True)
class SharedCase:
    """Hold one row of the table: the token of a case without law, and the case in words."""

    token: str
    words: str


def fold(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a record's JSON with the tables, given the plain one; their rows stand in the order of first use.

    A defect points to a case only where a cell does too, and a cell to a message only where another does: what stands
    alone is easier to read in its place, as is the case of a defect that was shrunk.
    """
    rows: dict[tuple[str, str], int] = {}
    uses = Counter(cell["message"] for cell in plain["cells"])
    shared = [text for text, count in uses.items() if count > 1 and text is not None]
    numbers = {text: index for index, text in enumerate(shared)}
    cells = [_folded_cell(cell, rows, numbers) for cell in plain["cells"]]
    parts = {
        "cases": [{"token": tokens.pack(tokens.NO_LAW, text), "words": words} for text, words in rows],
        "messages": shared,
        "cells": cells,
        "defects": [_folded_defect(defect, rows) for defect in plain["defects"]],
    }
    before = list(plain)[: list(plain).index("cells")]  # a reader from front to back has the tables before the cells
    return {name: plain[name] for name in before} | parts | {k: v for k, v in plain.items() if k not in parts}


def _folded_cell(cell: dict[str, Any], rows: dict[tuple[str, str], int], numbers: dict[str, int]) -> dict[str, Any]:
    """Return the cell with pointers, its case added to `rows`."""
    worst, message = cell["worst"], cell["message"]
    if worst is not None and (text := _shareable(worst["token"], cell["law"])) is not None:
        worst = {"case": rows.setdefault((text, worst["words"]), len(rows))}
    return cell | {"worst": worst, "message": numbers.get(message, message)}


def _folded_defect(defect: dict[str, Any], rows: dict[tuple[str, str], int]) -> dict[str, Any]:
    """Return the defect with its token and words as `witness`, null where it has neither."""
    token, words = defect["token"], defect["words"]
    text = None if token is None else _shareable(token, defect["law"])
    if (text, words) in rows:
        witness = {"case": rows[text, words]}
    else:
        witness = None if token is None and words is None else {"token": token, "words": words}
    named = {("witness" if name == "token" else name): value for name, value in defect.items() if name != "words"}
    return named | {"witness": witness}


def _shareable(token: str, law: str) -> str | None:
    """Return the text of the case from which, with the law, the token can be made again to the letter; else None."""
    text = tokens.case_text(token, law)
    return text if text is not None and tokens.pack(law, text) == token else None


@dataclass(frozen=True)
class _Tables:
    """Hold what is pointed to: of each case its JSON text and its words, and the messages."""

    cases: tuple[tuple[str, str], ...]
    messages: tuple[str, ...]


def unfold(value: dict[str, Any]) -> dict[str, Any]:
    """Return a record's JSON in the plain form; raise Mismatch where the tables, or what points into them, are unsound.

    All else is left as it is, for who decodes the plain form to judge. Tokens are packed anew, and by another zlib may
    be spelled in another way than where they were written; they say the same.
    """
    for name in ("cases", "messages"):
        if name not in value:
            raise Mismatch(f"record lacks the field {name!r}")
    cases = []
    for index, case in enumerate(decode(tuple[SharedCase, ...], value["cases"], "record.cases")):
        text = tokens.case_text(case.token, tokens.NO_LAW)
        if text is None:
            raise Mismatch(f"record.cases[{index}].token is not the token of a case without law")
        cases.append((text, case.words))
    tables = _Tables(tuple(cases), decode(tuple[str, ...], value["messages"], "record.messages"))
    plain = {name: item for name, item in value.items() if name not in ("cases", "messages")}
    for name, unfolded in (("cells", _unfolded_cell), ("defects", _unfolded_defect)):
        if isinstance(items := value.get(name), list):
            plain[name] = [
                unfolded(item, tables, f"record.{name}[{index}]") if isinstance(item, dict) else item
                for index, item in enumerate(items)
            ]
    return plain


def _unfolded_cell(cell: dict[str, Any], tables: _Tables, where: str) -> dict[str, Any]:
    worst, message = cell.get("worst"), cell.get("message")
    if isinstance(worst, dict) and "case" in worst:
        cell = cell | {"worst": _spelled_out(worst, cell.get("law"), tables, f"{where}.worst")}
    if isinstance(message, int):
        cell = cell | {"message": _row(tables.messages, message, f"{where}.message", "messages")}
    return cell


def _unfolded_defect(defect: dict[str, Any], tables: _Tables, where: str) -> dict[str, Any]:
    if "witness" not in defect:
        raise Mismatch(f"{where} lacks the field 'witness'")
    for name in ("token", "words"):
        if name in defect:
            raise Mismatch(f"{where} has the unknown field {name!r}")
    witness = defect["witness"]
    if isinstance(witness, dict) and "case" in witness:
        witness = _spelled_out(witness, defect.get("law"), tables, f"{where}.witness")
    elif witness is None:
        witness = {"token": None, "words": None}
    elif not isinstance(witness, dict) or witness.keys() != {"token", "words"}:
        raise Mismatch(f"{where}.witness is neither a case nor a token and words")
    return {name: item for name, item in defect.items() if name != "witness"} | witness


def _spelled_out(pointer: dict[str, Any], law: Any, tables: _Tables, where: str) -> dict[str, Any]:
    """Return token and words of what is pointed to; a `law` that is no text is refused by who decodes the rest."""
    if unknown := pointer.keys() - {"case"}:
        raise Mismatch(f"{where} has the unknown field {min(unknown)!r:.80}")
    text, words = _row(tables.cases, pointer["case"], f"{where}.case", "cases")
    return {"token": tokens.pack(law, text), "words": words}


def _row(table: tuple[Any, ...], index: Any, where: str, name: str) -> Any:
    """Return what an index points to; a negative one points to nothing."""
    if not isinstance(index, int) or isinstance(index, bool):
        raise Mismatch(f"{where} is not a whole number")
    if not 0 <= index < len(table):
        raise Mismatch(f"{where} is {index!r:.40}, where record.{name} has {len(table)} rows")
    return table[index]
