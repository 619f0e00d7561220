"""Progress of both arms: a bar each on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm


def _describe(row: dict[str, Any]) -> str:
    parts = []
    if row["train_accuracy"] is not None:
        parts.append(f"train accuracy {row['train_accuracy']:.1%}")
    if row["loss_std"] is not None:
        parts.append(f"loss {row['loss_std']:.3f}")
    if row["l1_density"] is not None:
        parts.append(f"L1-density {row['l1_density']:.3f}")
    return ", ".join(parts)


class Progress:
    """Shows the messages that run_arms passes on. Use as a context; call it as display(arm, message)."""

    def __init__(self, arms: tuple[str, ...], stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.bars: dict[str, tqdm[Any]] | None = None
        if self.stream.isatty():
            self.bars = {
                arm: tqdm(
                    desc=arm.upper(),
                    position=i,
                    file=self.stream,
                    dynamic_ncols=True,
                    bar_format="{desc:>4} {percentage:3.0f}% |{bar:24}| {elapsed}<{remaining} {postfix}",
                )
                for i, arm in enumerate(arms)
            }

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in (self.bars or {}).values():
            bar.close()

    def write(self, text: str) -> None:
        """A line of text that does not break the bars."""
        tqdm.write(text, file=self.stream)
        self.stream.flush()

    def __call__(self, arm: str, message: dict[str, Any]) -> None:
        """Shows one message of an arm."""
        if message.get("interrupting"):
            self.write("Stopping after the current step; both arms save their state ...")
        elif "warning" in message:
            self.write(f"{arm.upper()}: warning: {message['warning']}")
        elif self.bars is None:
            row = message.get("row")
            if row:
                self.write(
                    f"{arm.upper():>4} epoch {row['epoch']:3d}/{message['epochs']}  {row['seconds']:5.0f} s  "
                    f"{_describe(row)}"
                )
            elif message.get("evaluating"):
                self.write(f"{arm.upper():>4} trained; measuring mutual information on the test images")
        elif message.get("evaluating"):
            self.bars[arm].set_postfix_str("measuring mutual information")
        elif "step" in message:
            bar = self.bars[arm]
            bar.total = message["steps"]
            if bar.n == 0 and message["step"] > 1:
                bar.initial = message["step"] - 1  # a resumed run: the rate counts from here
                bar.n = bar.initial
            bar.update(message["step"] - bar.n)
            if message.get("row"):
                bar.set_postfix_str(_describe(message["row"]))
