"""Tables and figures of what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ..plots import finish

Rows = list[dict[str, Any]]


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(*head: str) -> list[str]:
    return [line(*head), "|---" * len(head) + "|"]


def number(value: float | None, form: str = ",.0f") -> str:
    """Empty where there is none."""
    return "" if value is None else format(value, form)


def bound_table(rows: Rows) -> list[str]:
    lines = [
        "The bound: epochs that the theorem asks for, and after how many of them the average stays "
        "at most epsilon^2 (median). Kept: runs whose average is so at the bound. Average: at the "
        "bound, as a part of epsilon^2. No runs: the bound is above 10 million.",
        "",
        *table(
            *("problem", "proof", "epsilon / gradient at the start", "estimates"),
            *("bound", "needed", "kept", "average"),
        ),
    ]
    for row in rows:
        found = ["", "no runs", ""]
        if row["runs"]:
            kept = f"{row['kept']} of {row['runs']}"
            found = [number(row["needed"]), kept, number(row["average"], ".3f")]
        about = (row["problem"], row["proof"], row["epsilon"], row["way"])
        lines.append(line(*about, number(row["bound"]), *found))
    return lines


def real_table(rows: Rows) -> list[str]:
    lines = [
        "The library's optimizer: epochs until the average is first at most epsilon^2, a number a "
        "seed, and those of 100 simulated runs, mean ± sample deviation.",
        "",
        *table("epsilon / gradient at the start", "estimates", "bound", "HybridZOFO", "simulated"),
    ]
    for row in rows:
        ours = ", ".join(map(number, row["ours"]))
        simulated = f"{row['mean']:.0f} ± {row['deviation']:.0f}"
        lines.append(line(row["epsilon"], row["way"], number(row["bound"]), ours, simulated))
    return lines


def faults_table(rows: Rows) -> list[str]:
    lines = [
        "What must fail: zeroth-order estimates, or rates, multiplied by a factor.",
        "",
        *table("factor", "kept", "average / epsilon^2"),
    ]
    for row in rows:
        kept = f"{row['kept']} of {row['runs']}"
        average = "diverges" if row["average"] is None else f"{row['average']:.3g}"
        lines.append(line(f"{row['scale']:g}", kept, average))
    return lines


def exponents_table(rows: Rows) -> list[str]:
    lines = [
        "Exponents: slopes of the logarithm of epochs over that of epsilon or d_x, with standard "
        "errors of the fit.",
        "",
        *table("what varies", "condition that binds lr_zo", "of the bound", "measured"),
    ]
    for row in rows:
        fits = [f"{slope:.2f} ± {error:.2f}" for slope, error in (row["fit of bound"], row["fit"])]
        lines.append(line(row["case"], f"`{row['binding']}`", *fits))
    return lines


def failures_table(rows: Rows) -> list[str]:
    lines = [
        "Failures: runs whose average is above epsilon^2 after the bound's epochs; the interval is "
        "that of their probability, at a confidence of 99 %.",
        "",
        *table(
            "problem", "proof", "delta", "epochs", "failed", "probability", "average / epsilon^2"
        ),
    ]
    for row in rows:
        failed = f"{row['failed']} of {row['runs']}"
        interval = f"{row['least']:.3f} to {row['most']:.3f}"
        about = (row["problem"], row["proof"], row["delta"], number(row["bound"]))
        lines.append(line(*about, failed, interval, f"{row['average']:.3g}"))
    return lines


def sampling_table(rows: Rows) -> list[str]:
    lines = [
        "Random orders against draws with replacement: the average squared gradient that is left.",
        "",
        *table("noise in", "lr_fo L n", "orders", "draws", "ratio"),
    ]
    for row in rows:
        left = (f"{row['orders']:.3g}", f"{row['draws']:.3g}", f"{row['ratio']:.3g}")
        lines.append(line(row["noise"], row["part"], *left))
    return lines


def rates_table(found: dict[str, Any]) -> list[str]:
    one, two = found["single"], found["pair"]
    return [
        "One rate against two, where curvatures are 100 and 1: epochs to 1 % of the gradient.",
        "",
        *table("", "lr_zo", "lr_fo", "epochs"),
        line("best single rate", f"{one['lr']:.2g}", f"{one['lr']:.2g}", number(one["epochs"])),
        line("best pair", f"{two['lr_zo']:.2g}", f"{two['lr_fo']:.2g}", number(two["epochs"])),
    ]


def lemma_table(rows: Rows) -> list[str]:
    lines = [
        "Lemma B.5, measured with the library's optimizer: ratios to its bounds, and to the exact "
        "variance of a function without curvature; ± standard errors.",
        "",
        *table(
            "estimator", "directions", "d", "case", "variance / bound", "/ exact", "bias / bound"
        ),
    ]
    for row in rows:
        variance = f"{row['variance / bound']:.3g} ± {row['error']:.1g}"
        exact = bias = ""
        if "variance / exact" in row and "unlike" not in row["estimator"]:
            exact = f"{row['variance / exact']:.3f} ± {row['exact error']:.3f}"
        if "bias / bound" in row:
            bias = f"{row['bias / bound']:.3f} ± {row['bias error']:.3f}"
        about = (row["estimator"], row["kind"], row["d"], row["case"])
        lines.append(line(*about, variance, exact, bias))
    return lines


CONSTANTS = {
    "limit_x": "lr_zo L n (d + 2) at most 1/72",
    "limit_y": "lr_fo M n at most 1/2",
    "left": "1/4 of lr n times the squared gradient is left",
    "noise_x": "18 (d + 2) n L lr_zo^2 sigma_x^2",
    "noise_y": "(5/16) n M lr_fo^2 sigma_y^2",
    "by_mu": "4.42 n L lr_zo^2 kappa",
}


def epoch_table(rows: Rows) -> list[str]:
    """The last factor without a violation, and the first one with some."""
    lines = [
        "One epoch on random quadratics, in expectation, exactly: how many violate the inequality "
        "of step 4 with a constant off by a factor, to the worse side.",
        "",
        *table("constant", "none violated with", "violated with"),
    ]
    for row in rows:
        first = next(place for place, count in enumerate(row["violated"]) if count)
        factor, count = row["factors"][first], row["violated"][first]
        some = f"{factor:g}: {count} of {row['problems']}"
        lines.append(line(CONSTANTS[row["constant"]], f"{row['factors'][first - 1]:g}", some))
    return lines


TABLES: dict[str, Callable[[Any], list[str]]] = {
    "bound": bound_table,
    "real": real_table,
    "faults": faults_table,
    "exponents": exponents_table,
    "failures": failures_table,
    "epoch": epoch_table,
    "sampling": sampling_table,
    "rates": rates_table,
    "lemma": lemma_table,
}


def plot_exponents(path: Path, rows: Rows) -> None:
    """Epochs over 1/epsilon, and over d_x: bounds dashed, measured ones with points."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for number_, row in enumerate(rows):
        over_d = row["case"].startswith("d_x")
        axis, colour = axes[int(over_d)], f"C{number_}"
        x = np.array(row["values"], dtype=float)
        x = x if over_d else 1 / x
        label = f"{row['case']}: {row['fit'][0]:.2f} ± {row['fit'][1]:.2f}"
        axis.loglog(x, row["needed"], "o-", color=colour, markersize=4, label=label)
        axis.loglog(x, row["bounds"], "--", color=colour, linewidth=1)
    axes[0].set(xlabel="gradient at the start / epsilon", ylabel="epochs (dashed: bound)")
    axes[1].set(xlabel="d_x")
    for axis in axes:
        axis.legend(frameon=False, fontsize=7)
    finish(figure, "Epochs until the average squared gradient stays below epsilon^2", path)


def plot_faults(path: Path, rows: Rows) -> None:
    """Averages over the factor."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    shown = [row for row in rows if row["scale"] > 0 and row["average"] is not None]
    axis.loglog([row["scale"] for row in shown], [row["average"] for row in shown], "o-")
    for row in rows:
        if row["scale"] > 0 and row["average"] is None:
            axis.axvline(row["scale"], color="#D55E00", linewidth=1, label="diverges")
    axis.axhline(1, color="#555555", linewidth=0.8, linestyle="--", label="epsilon^2")
    axis.set(xlabel="factor of the theorem's lr_zo", ylabel="average / epsilon^2")
    axis.legend(frameon=False, fontsize=8)
    finish(figure, "Average squared gradient after the bound's epochs", path)


PLOTS: dict[str, Callable[[Path, Any], None]] = {
    "exponents": plot_exponents,
    "faults": plot_faults,
}


def render(folder: Path) -> str:
    """`table.md` and figures of all parts that are in the folder; returns the table."""
    parts = []
    for name, make in TABLES.items():
        path = folder / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))["result"]
            parts.append("\n".join(make(found)))
            if name in PLOTS:
                PLOTS[name](folder / f"{name}.png", found)
    text = "\n\n".join(parts) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text
