"""Writes what a study measured into a page of the documentation, between two lines that stay."""

from __future__ import annotations

from pathlib import Path

END = "<!-- end -->"


def write_between(page: Path, begin: str, text: str) -> None:
    """Replaces what stands between the line `begin` and the next END; SystemExit where the page lacks them."""
    old = page.read_text()
    if begin not in old or END not in old.split(begin)[1]:
        raise SystemExit(f"report: {page} must hold the lines {begin} and {END}")
    head, rest = old.split(begin, 1)
    page.write_text(f"{head}{begin}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}")
