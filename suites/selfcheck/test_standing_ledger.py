"""Every witness in PEFT's ledger still shows what its entry says: a law that looks away is noticed here."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftcheck import ledger
from peftcheck.law import laws

peft = pytest.importorskip("peftcheck.implementations.peft")
LIBRARY = peft.Peft()
FILES = sorted(Path(LIBRARY.ledger).glob("*.toml"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_entry_stands(path: Path) -> None:
    court = ledger.Court(ledger.load(path), LIBRARY, laws())
    heard = {entry.id: court.hearing(entry.id) for entry in court.entries()}
    assert heard
    assert {name: one.message for name, one in heard.items() if one.verdict not in ("known", "inactive")} == {}
