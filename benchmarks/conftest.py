"""Settings of the benchmarks under pytest."""

import measure

measure.steady_memory()
