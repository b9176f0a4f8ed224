"""Plots and tables of `sixteen_bit.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "MeZO's recipe": "#D55E00",
    "in place, two-sided": "#0072B2",
    "in place, one-sided": "#56B4E9",
    "streamed": "#009E73",
    "fp32": "#000000",
    "bf16, stochastic": "#0072B2",
    "bf16, nearest": "#E69F00",
    "fp16, stochastic": "#56B4E9",
    "fp16, nearest": "#CC79A7",
    "bf16 in place": "#0072B2",
    "bf16 streamed": "#009E73",
    "bf16 nearest": "#E69F00",
    "fp32 MeZO's recipe": "#999999",
    "bf16 MeZO's recipe": "#D55E00",
    "fp16 in place": "#56B4E9",
    "fp16 MeZO's recipe": "#CC79A7",
}
Content = dict[str, Any]


def panels(number: int) -> tuple[Any, list[Any]]:
    size = (1 + 4.3 * number, 4.2)
    figure, axes = plt.subplots(1, number, figsize=size, layout="constrained", squeeze=False)
    for one in axes[0]:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def finish(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_drift(path: Path, content: Content) -> None:
    """RMS distance over sigma against steps, one panel a dtype; the legend says what stays at 0."""
    result, sigma = content["result"], content["settings"]["sigma"]
    figure, axes = panels(len(result["rms"]))
    for one, (dtype, methods) in zip(axes, result["rms"].items(), strict=True):
        for method, rms in methods.items():
            label = method if any(rms) else f"{method}: 0"
            relative = [value / sigma or float("nan") for value in rms]
            one.loglog(result["steps"], relative, "o-", ms=3, c=COLOURS[method], label=label)
        one.set(title=dtype, xlabel="steps under a constant loss")
        one.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("RMS distance from the start / sigma")
    finish(figure, path)


def plot_survival(path: Path, content: Content) -> None:
    """Part of the update that is kept, and its error, against its size over sigma."""
    result, sigma = content["result"], content["settings"]["sigma"]
    figure, (left, right) = panels(2)
    relative = [size / sigma for size in result["sizes"]]
    for name, rows in result.items():
        if name == "sizes":
            continue
        style = {"ls": "--" if name.endswith("nearest") else "-", "c": COLOURS[name], "label": name}
        left.semilogx(relative, rows["kept"], **style)
        right.loglog(relative, rows["error"], **style)
    left.set(xlabel="RMS update / sigma", ylabel="part of one update that is kept")
    right.set(xlabel="RMS update / sigma", ylabel="|made - asked| / |asked|")
    left.legend(frameon=False, fontsize=8)
    finish(figure, path)


def series(runs: Mapping[str, Any], key: str) -> list[list[float]]:
    """By seed, the values of `key` at every evaluation."""
    return [[point[key] for point in run["curve"]] for run in runs.values()]


def plot_finetune(path: Path, content: Content) -> None:
    """Training and development loss against steps, a pair of panels a rate: mean and range."""
    rates = content["result"]["rates"]
    figure, axes = panels(2 * len(rates))
    for position, (rate, recipes) in enumerate(rates.items()):
        for one, key in zip(axes[2 * position :], ("train_loss", "dev_loss"), strict=False):
            for name, runs in recipes.items():
                steps = [point["step"] for point in next(iter(runs.values()))["curve"]]
                columns = list(zip(*series(runs, key), strict=True))
                dash = "--" if "MeZO" in name else "-"
                means = [statistics.fmean(column) for column in columns]
                one.plot(steps, means, dash, c=COLOURS[name], label=name, lw=1.6)
                low, high = [min(c) for c in columns], [max(c) for c in columns]
                one.fill_between(steps, low, high, color=COLOURS[name], alpha=0.12, lw=0)
            kind = "training" if key == "train_loss" else "development"
            one.set(xlabel="step", title=f"{kind} loss, rate {rate}")
    axes[0].legend(frameon=False, fontsize=8)
    finish(figure, path)


def plot_bias(path: Path, content: Content) -> None:
    """Share of the gradient against the weights' size, one panel a distribution."""
    result = content["result"]
    figure, axes = panels(2)
    for one, distribution in zip(axes, ("gaussian", "rademacher"), strict=True):
        for name, rows in result.items():
            label, _, kind = name.rpartition(", ")
            if kind != distribution:
                continue
            colour = COLOURS[f"{label[:4]}, stochastic"] if label != "fp32" else COLOURS["fp32"]
            dash = "--" if "version 1" in label else "-"
            one.semilogx(result["around"], rows["share"], dash, c=colour, label=label)
        one.set(xlabel="size of the weights", title=distribution)
    axes[0].set_ylabel("share of the gradient in the mean estimate")
    axes[0].legend(frameon=False, fontsize=8)
    finish(figure, path)


def plot_slopes(path: Path, content: Content) -> None:
    """Share of the slope, with two standard errors, and noise, by way."""
    rows = {name: row for name, row in content["result"].items() if name != "problem"}
    figure, (left, right) = panels(2)
    places = range(len(rows))
    shares, errors = ([row[key] for row in rows.values()] for key in ("share", "error"))
    left.errorbar(shares, places, xerr=[2 * error for error in errors], fmt="o", ms=4)
    right.barh(places, [row["noise"] for row in rows.values()], height=0.5)
    left.set(yticks=places, yticklabels=rows, xlabel="share of the slope in fp32")
    right.set(yticks=places, yticklabels=[], xlabel="noise over the slopes' deviation")
    finish(figure, path)


PLOTS: dict[str, Callable[[Path, Content], None]] = {
    "drift": plot_drift,
    "survival": plot_survival,
    "bias": plot_bias,
    "slopes": plot_slopes,
    "finetune": plot_finetune,
}


def finetune_line(name: str, lr: float, seed: int, run: Mapping[str, Any]) -> str:
    first, last = run["curve"][0], run["curve"][-1]
    text = f"rate {lr:g}, seed {seed}, {name}: development loss {first['dev_loss']:.4f} -> "
    text += f"{last['dev_loss']:.4f}, {run['seconds_per_step']:.3f} s a step"
    return text


def mean_std(values: Sequence[float], form: str = ".4f") -> str:
    text = format(statistics.fmean(values), form)
    if len(values) > 1:
        text += f" ± {format(statistics.stdev(values), form.lstrip('+'))}"
    return text


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def drift_table(content: Content) -> list[str]:
    result, settings = content["result"], content["settings"]
    lines = [
        f"Drift: RMS distance from the start in % of sigma = {settings['sigma']:g}, "
        f"mu = {settings['mu']:g}, {settings['count']:,} weights, after so many steps with "
        "projected gradient 0.",
        "",
    ]
    shown = [i for i, s in enumerate(result["steps"]) if str(s).rstrip("0") == "1"]
    shown += [len(result["steps"]) - 1] * (len(result["steps"]) - 1 not in shown)
    steps = [result["steps"][i] for i in shown]
    lines.append(row("weights", "recipe", *(f"{s:,}" for s in steps)))
    lines.append("|---" * (2 + len(steps)) + "|")
    for dtype, methods in result["rms"].items():
        for method, rms in methods.items():
            cells = [f"{100 * rms[i] / settings['sigma']:.2g}" for i in shown]
            lines.append(row(dtype, method, *cells))
    return lines


def survival_table(content: Content) -> list[str]:
    result, settings = content["result"], content["settings"]
    names = [name for name in result if name != "sizes"]
    lines = [
        "Survival: part of one Gaussian update of RMS size lr c that is kept, in %; in brackets "
        f"|made - asked| / |asked|, in %; sigma = {settings['sigma']:g}, {settings['count']:,} "
        f"weights, mean ± sample deviation of {settings['repeats']} directions.",
        "",
        row("lr c", *names),
        "|---" * (1 + len(names)) + "|",
    ]
    for i, size in enumerate(result["sizes"]):
        if size not in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3) and len(result["sizes"]) > 5:
            continue
        cells = []
        for name in names:
            kept, spread, error = (100 * result[name][k][i] for k in ("kept", "spread", "error"))
            cells.append(f"{kept:.1f} ± {spread:.1f} ({error:,.0f})")
        lines.append(row(f"{size:.0e}", *cells))
    return lines


def bias_table(content: Content) -> list[str]:
    result, settings = content["result"], content["settings"]
    lines = [
        "Bias: share of the gradient that two-sided estimates hold on average, in %, by the size "
        f"of the weights (uniform on [1, 2) times it); mu = {settings['mu']:g}, "
        f"{settings['count']:,} weights, {settings['repeats']} directions; the standard error is "
        f"at most {100 * max(max(r['error']) for n, r in result.items() if n != 'around'):.1f}.",
        "",
        row("weights", *(f"{size:.2g}" for size in result["around"])),
        "|---" * (1 + len(result["around"])) + "|",
    ]
    for name, rows in result.items():
        if name != "around":
            lines.append(row(name, *(f"{100 * share:.1f}" for share in rows["share"])))
    return lines


def slopes_table(content: Content) -> list[str]:
    result, settings = content["result"], content["settings"]
    lines = [
        f"Slopes of the loss of {settings['batch_size']} examples, of a {result['problem']} "
        f"({settings['model'] or 'MiniLM'}), in 16 bits beside fp32 at the same weights, along the "
        f"same {settings['repeats']} directions ({settings['distribution']}), two-sided, mu = "
        f"{settings['mu']:g}: the share of the slope that is found, with its standard error, and "
        "the noise, over the slopes' deviation.",
        "",
        row("weights, directions", "share", "noise"),
        "|---" * 3 + "|",
    ]
    for name, found in result.items():
        if name != "problem":
            share = f"{found['share']:.3f} ± {found['error']:.3f}"
            lines.append(row(name, share, f"{found['noise']:.2f}"))
    return lines


def finetune_table(content: Content) -> list[str]:
    settings, rates = content["settings"], content["result"]["rates"]
    some = next(iter(next(iter(rates.values())).values()))
    one = next(iter(some.values()))
    accuracy = "dev_accuracy" in one["curve"][-1]
    lines = [
        f"Fine-tuning a {content['result']['problem']} ({settings['model'] or 'MiniLM'}, "
        f"{one['parameters']:,} parameters by zeroth order): {settings['steps']} steps of "
        f"{settings['batch_size']}, {len(some)} seeds, mu = {settings['mu']:g}; "
        f"{settings['schedule']} rates. Losses at the end, mean ± sample deviation; the difference "
        "is to the same recipe in fp32, seed by seed.",
        "",
        row(
            *("rate", "recipe", "training loss", "development loss", "difference to fp32"),
            *(["accuracy, %"] if accuracy else []),
            "s/step",
        ),
        "|---" * (6 + accuracy) + "|",
    ]
    for rate, recipes in rates.items():
        start = statistics.fmean(s[0] for s in series(next(iter(recipes.values())), "dev_loss"))
        train = statistics.fmean(s[0] for s in series(next(iter(recipes.values())), "train_loss"))
        cells = [rate, "(start)", f"{train:.4f}", f"{start:.4f}", ""]
        if accuracy:
            runs = next(iter(recipes.values()))
            cells.append(f"{100 * series(runs, 'dev_accuracy')[0][0]:.1f}")
        lines.append(row(*cells, ""))
        for name, runs in recipes.items():
            last = [s[-1] for s in series(runs, "dev_loss")]
            reference = "fp32 MeZO's recipe" if "MeZO" in name else "fp32"
            difference = ""
            if reference in recipes and reference != name:
                other = [s[-1] for s in series(recipes[reference], "dev_loss")]
                difference = mean_std([a - b for a, b in zip(last, other, strict=True)], "+.4f")
            trained = mean_std([s[-1] for s in series(runs, "train_loss")])
            cells = [rate, name, trained, mean_std(last), difference]
            if accuracy:
                cells.append(mean_std([100 * s[-1] for s in series(runs, "dev_accuracy")], ".1f"))
            seconds = statistics.median(run["seconds_per_step"] for run in runs.values())
            lines.append(row(*cells, f"{seconds:.3f}"))
    return lines


TABLES: dict[str, Callable[[Content], list[str]]] = {
    "drift": drift_table,
    "survival": survival_table,
    "bias": bias_table,
    "slopes": slopes_table,
    "finetune": finetune_table,
}


def write_table(folder: Path) -> str:
    """`table.md` of all results in the folder; returns it."""
    contents = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    order = list(TABLES)
    contents.sort(key=lambda content: order.index(content["command"]))
    text = "\n\n".join("\n".join(TABLES[c["command"]](c)) for c in contents) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text
