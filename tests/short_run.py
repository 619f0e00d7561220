"""A run of csg-ext train of a few seconds."""

SHORT = [
    "--no-flip",
    "--low-share",
    "0",
    "--precision",
    "fp32",
    "--epochs",
    "6",
    "--threads",
    "1",
    "--device",
    "cpu",
]
