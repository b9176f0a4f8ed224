"""Run the benchmarks: `python benchmarks/run.py [--only PATTERN] [--out DIR]`; see `--help`."""

from zofo_bench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
