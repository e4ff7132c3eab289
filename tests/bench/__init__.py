"""Benchmarks: `make bench`, or one alone with `python -m tests.bench.relay` and `python -m tests.bench.engine`.

Not tests: nothing here runs under pytest, and nothing in the tests depends on how fast a machine is.
"""
