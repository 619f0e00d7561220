"""Other libraries' errors and names from files as parts of a sentence of ours, and tables as aligned text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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


def aligned(rows: Sequence[Sequence[str]], columns: int) -> list[str]:
    """Rows of cells as lines of text: the first column to the left, the others to the right.

    Cells beyond `columns` follow as they are. The only cell of a row is a heading and makes no column wider.
    """
    widths = [max(len(row[i]) for row in rows if i < len(row) and len(row) > 1) for i in range(columns)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells, *row[columns:]]).rstrip())
    return lines
