"""The test module that `peftcheck run` hands to pytest: every cell of the implementation that it is asked for."""

from __future__ import annotations

import peftcheck


@peftcheck.parametrize()
def test_conformance(check) -> None:
    check()
