"""Benchmarks of zofo_kernels and zofo_optim.

A benchmark is a generator of cases in a file of its own, entered in one registry
(``registry.py``). A case holds variants of the same work and a check of their results; the
runner (``cli.py``) runs the check, times the variants in turn (``timing.py``) and reports.
"""
