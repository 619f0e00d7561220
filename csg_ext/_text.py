"""Other libraries' errors as a part of a sentence of ours."""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters; its type where it says nothing."""
    return " ".join(f"{error!s:.300}".split()) or type(error).__name__
