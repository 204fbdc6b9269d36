"""The sections of benchmarks/gpu_suite.py: each has run(settings), which yields rows, and table(rows, every)."""
