"""Benchmarks of attndsl beside its peers; `python -m benchmarks --help`, method in README.md."""
