"""Benchmarks: one story a file, run by ``python -m benchmarks STORY``."""
