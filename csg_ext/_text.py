"""Other libraries' errors, and names from files, as parts of a sentence of ours."""

from __future__ import annotations

from collections.abc import Iterable


def reason(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters; its type where it says nothing."""
    return " ".join(f"{error!s:.300}".split()) or type(error).__name__


def name_list(names: Iterable[object]) -> str:
    """Names that a file holds, for a sentence: at most ten, each short and on one line, or `none`."""
    ordered = sorted(map(str, names))
    shown = [name if name.isprintable() and name else repr(name) for name in ordered[:10]]
    shown = [name if len(name) <= 60 else name[:57] + "..." for name in shown]
    more = [f"{len(ordered) - 10} more"] if len(ordered) > 10 else []
    return ", ".join(shown + more) or "none"
