"""Settings of the benchmarks under pytest."""

import cases

cases.steady_memory()
