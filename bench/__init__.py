"""Benchmarks: `pytest bench --benchmark-only`, or `python -m bench.run` for a results file."""
