"""Make untrusted text harmless where it is shown: a terminal, Markdown, XML, a shell, a link.

HTML is escaped by jinja2. Names, messages and records come from libraries and files, so everything passes
here.
"""

from __future__ import annotations

import re
import shlex
from urllib.parse import urlsplit

# Control characters but tab and newline, and lone surrogates. Also the marks that reorder what a reader sees.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$>-])")


def plain(text: object) -> str:
    """Return text of which no character can steer a terminal, break XML, or change the reading order."""
    return _UNSAFE.sub("\ufffd", str(text).replace("\r\n", "\n").replace("\r", "\n"))


def line(text: object) -> str:
    """Return `plain` text on one line."""
    return " ".join(plain(text).split())


def link(url: object) -> str | None:
    """Return the address if it is http or https, has a host, and needs no quoting; else None."""
    text = str(url or "")
    if not text.isascii() or not text.isprintable() or re.search(r"[\s<>\"'`\\|(){}\[\]]", text):
        return None
    try:
        parts = urlsplit(text)
        return text if parts.scheme in ("http", "https") and parts.hostname else None
    except ValueError:
        return None


def replay(token: str) -> str:
    """Return the command that replays a token, safe to paste into a POSIX shell."""
    return f"peftcheck replay {shlex.quote(line(token))}"


def markdown(text: object) -> str:
    """Return one line that GitHub shows as it is: no markup, HTML, link, mention, or issue reference."""
    escaped = _MARKDOWN.sub(r"\\\1", line(text).replace("&", "&amp;")).replace("<", "&lt;")
    # Mentions, references and bare addresses are found in the rendered text, where a backslash no longer
    # shows. A word joiner (U+2060) after the sign that starts them is invisible and ends the match.
    escaped = re.sub(r"@(?=\w)", "@\u2060", escaped)
    escaped = re.sub(r"\\#(?=\d)", "\\#\u2060", escaped)
    escaped = escaped.replace("://", ":\u2060//")
    # A number with a point would open a list.
    escaped = re.sub(r"^(\d+)([.)])", r"\1\\\2", escaped)
    return re.sub(r"(?i)\bwww\.", lambda found: found[0][:3] + "\u2060.", escaped)


def code(text: object, in_table: bool = False) -> str:
    """Return a Markdown code span; in a table a pipe must be escaped even there."""
    shown = line(text)
    if in_table:
        shown = shown.replace("|", "\\|")
    fence = _fence(shown, 1)
    pad = " " if not shown or shown[0] in "` " or shown[-1] in "` " else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def block(text: object, language: str = "") -> str:
    """Return a Markdown code block with a fence that the text cannot close."""
    shown = plain(text).rstrip("\n")
    fence = _fence(shown, 3)
    return f"{fence}{language}\n{shown}\n{fence}"


def _fence(text: str, least: int) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)


def encodable(text: str) -> str:
    """Return text that UTF-8 can hold: JSON may bring lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")
