"""Pack a law and a case into a token, and take it apart: text only, what it says is `case.py`'s.

A token is the prefix and, in URL-safe base64, the deflated JSON text of [law, case].
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib

from peftcheck.errors import UsageError

TOKEN_PREFIX = "pc1."
NO_LAW = ""  # stands for the law in the token of a case alone
_LONGEST = 1 << 20  # of the text, in bytes: a short token could unpack to gigabytes


def pack(law: str, case: str) -> str:
    """Return the token of a law and a case; `case` is JSON text."""
    text = f"[{json.dumps(law)},{case}]"
    return TOKEN_PREFIX + base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode().rstrip("=")


def unpack(token: str) -> str:
    """Return the text within a token, the JSON of [law, case] where it was made by `pack`; else raise UsageError."""
    token = token.strip()
    if not token.startswith(TOKEN_PREFIX):
        raise UsageError(f"not a token: it must start with '{TOKEN_PREFIX}'; copy it whole from a report")
    body = token[len(TOKEN_PREFIX) :]
    try:
        packed = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        inflater = zlib.decompressobj()
        text = inflater.decompress(packed, _LONGEST)
        if not inflater.eof:
            raise ValueError("truncated")
        return text.decode()
    except (binascii.Error, zlib.error, ValueError) as error:
        raise broken(error) from error


def case_text(token: str, law: str) -> str | None:
    """Return the JSON text of the case in a token of this law; None where the token is of another, or none."""
    try:
        text = unpack(token)
    except UsageError:
        return None
    head = f"[{json.dumps(law)},"
    return text[len(head) : -1] if text.startswith(head) and text.endswith("]") else None


def broken(error: Exception) -> UsageError:
    """Return the error that says that a token was damaged; `error` tells how it was noticed."""
    return UsageError(f"broken token ({type(error).__name__}): copy it whole from a report")
