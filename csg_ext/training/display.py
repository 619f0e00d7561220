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


def _format(arm: str, text: str) -> str:
    return f"{arm.upper():>4} {{percentage:3.0f}}% |{{bar:16}}| {{elapsed}}<{{remaining}}  {text}"


class Progress:
    """Shows the messages that run_arms passes on. Use as a context; call it as display(arm, message)."""

    def __init__(self, arms: tuple[str, ...], stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.bars: dict[str, tqdm[Any]] | None = None
        if self.stream.isatty():
            self.bars = {
                arm: tqdm(
                    total=1, position=i, file=self.stream, dynamic_ncols=True, bar_format=_format(arm, "starting")
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
        elif self.bars is not None:
            self._draw(self.bars[arm], arm, message)
        elif message.get("row"):
            row = message["row"]
            self.write(
                f"{arm.upper():>4} epoch {row['epoch']:3d}/{message['epochs']}  {row['seconds']:5.0f} s  "
                f"{_describe(row)}"
            )
        elif message.get("evaluating"):
            self.write(f"{arm.upper():>4} trained; measuring mutual information on the test images")

    @staticmethod
    def _draw(bar: tqdm[Any], arm: str, message: dict[str, Any]) -> None:
        if message.get("evaluating"):
            bar.bar_format = _format(arm, "measuring mutual information")
        else:
            if bar.n == 0:  # the first message: time and rate count from here, also in a resumed run
                bar.reset(message["steps"])
                bar.initial = bar.n = message["step"] - 1
                bar.bar_format = _format(arm, "")
            if message.get("row"):
                bar.bar_format = _format(arm, _describe(message["row"]))
            bar.n = message["step"]
        bar.refresh()
