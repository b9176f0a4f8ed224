"""Run the benchmarks: `python benchmarks/run.py [--only PATTERN] [--out DIR]`; see `--help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # of experiments

from zofo_bench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
