"""python -m experiments.architectures: a step on every class of transformers, built tiny."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .classes import Case, all_cases
from .records import Records, summary
from .report import counts_table, failures_table
from .tasks import TASKS
from .worker import Worker

OUT = Path(__file__).parents[1] / "results" / "architectures" / "classes.json"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m experiments.architectures", description=__doc__)
    made.add_argument("names", nargs="*", help="classes, kinds of models or tasks; default: all")
    made.add_argument("--out", type=Path, default=OUT, help="the JSON file (default: %(default)s)")
    made.add_argument("--resume", action="store_true", help="keep what the file has, do the rest")
    made.add_argument("--failed", action="store_true", help="with --resume: do what failed again")
    made.add_argument("--markdown", action="store_true", help="only print the file's tables")
    made.add_argument("--limit", type=float, default=150.0, help="seconds of one class")
    return made


def wanted(names: Sequence[str]) -> list[Case]:
    """The cases of these classes, kinds of models or tasks; all, where none is named.

    Raises:
        ValueError: a name is none of them.
    """
    cases = all_cases()
    if not names:
        return list(cases.values())
    known = {*cases, *(c.model_type for c in cases.values()), *TASKS}
    for name in names:
        if name not in known:
            raise ValueError(f"names must be classes, model types or tasks, got {name!r}")
    return [c for c in cases.values() if {c.name, c.task, c.model_type} & set(names)]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.markdown:
        found = Records(arguments.out, keep=True).classes
        print(counts_table(found), failures_table(found), sep="\n\n")
        return 0
    try:
        cases = wanted(arguments.names)
    except ValueError as error:
        parser().error(str(error))
    records = Records(arguments.out, keep=arguments.resume or bool(arguments.names))
    again = arguments.failed or bool(arguments.names and not arguments.resume)
    worker = Worker(arguments.limit)
    try:
        for number, case in enumerate(cases, 1):
            if records.done(case.name, again=again, failed_only=arguments.failed):
                continue
            result = worker.examine(case)
            records.add(case.name, result)
            print(f"{number}/{len(cases)} {case.name}: {records.line(case.name)}", flush=True)
    except KeyboardInterrupt:
        print("Interrupted; with --resume the same command goes on.")
        return 130
    finally:
        worker.close()
    print(summary(records.classes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
