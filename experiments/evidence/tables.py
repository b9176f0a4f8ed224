"""The page's tables: who wins at equal steps, at equal time and at equal memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..partition.recipes import LORA
from ..partition.regions import ALONE, LOSES, TIES, WINS, Point, verdict
from ..report import markdown, mean
from .found import Entry, Found, in_page_order, mean_of
from .grid import STUDIES

VERDICTS = {
    WINS: "zeroth order",
    LOSES: "gradients alone",
    TIES: "within the spread",
    ALONE: "zeroth order: nothing else fits",
}
"""Between the best that uses zeroth order and the best that does not."""
Values = Callable[[Found, Entry], "list[float] | None"]


def names(found: Sequence[Found]) -> list[str]:
    """Of all methods, in the page's order."""
    there = {entry.name for one in found for entry in one.entries}
    order = [cell.recipe.name for study in STUDIES for cell in in_page_order(study)]
    more = [entry.name for one in found for entry in one.entries]
    return [name for name in dict.fromkeys([*order, *more]) if name in there]


def by_task(found: Sequence[Found], values: Values, digits: int = 3, scale: float = 1.0) -> str:
    """A row a method, a column a task; the lowest of a column, and what ties with it, in bold."""
    columns = [{entry.name: values(one, entry) for entry in one.entries} for one in found]
    rows = [["method", *(one.title for one in found)]]
    for name in names(found):
        row = [name]
        for column in columns:
            own = column.get(name)
            text = "" if own is None else mean(own, digits, scale)
            if own is not None and _leads(own, [v for v in column.values() if v is not None]):
                text = f"**{text}**"
            row.append(text)
        rows.append(row)
    return markdown(rows)


def _leads(own: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """Whether nothing is lower by more than the larger spread."""
    best = min((Point("", False, 0.0, tuple(one)) for one in others), key=lambda p: p.mean)
    here = Point("", False, 0.0, tuple(own))
    return math.isfinite(here.mean) and here.mean - best.mean <= max(here.spread, best.spread)


def test_losses(found: Found, entry: Entry) -> list[float]:
    return entry.losses


def at_equal_time(found: Found, entry: Entry) -> list[float] | None:
    """Development losses when the quickest run is over; None where the step is not measured."""
    return entry.after(found.shortest) if entry in found.timed else None


def equal_time(found: Sequence[Found]) -> str:
    """The table of losses at equal time; columns without measured steps are left out."""
    return by_task([one for one in found if one.timed], at_equal_time)


def accuracies(found: Sequence[Found]) -> str:
    """Test accuracy in percent, of the encoder, where it tells something."""
    own = [one for one in found if one.scored and one.title.endswith("MiniLM")]
    rows = [["method", *(one.title for one in own)]]
    for name in names(own):
        entries = [one.entry(name) for one in own]
        rows.append([name, *("" if e is None else mean(e.accuracies, 1, 100) for e in entries)])
    return markdown(rows)


def costs(found: Sequence[Found]) -> str:
    """Forward passes of a step, and megabytes at its worst moment, plain and saving memory."""
    own = [one for one in found if one.timed]
    rows = [["step", *(one.title for one in own)]]
    cells = [
        {
            **({"forward pass": one.forward} if one.forward else {}),
            **{
                entry.name + (f", {saving.name}" if saving.name else ""): cost
                for entry in one.entries
                for saving, cost in entry.costs.items()
            },
        }
        for one in own
    ]
    for name in dict.fromkeys(name for column in cells for name in column):
        rows.append(
            [
                name,
                *(
                    f"{c[name]['passes']:.1f}; {c[name]['peak_bytes'] / 1e6:.1f}"
                    if name in c
                    else ""
                    for c in cells
                ),
            ]
        )
    return markdown(rows)


def best(entries: Sequence[Entry], values: Callable[[Entry], list[float]]) -> list[Point | None]:
    """Of what uses zeroth order, and of the rest."""
    found: list[Point | None] = []
    for which in (True, False):
        points = [entry.point(values(entry)) for entry in entries if entry.zeroth_order == which]
        found.append(min(points, key=lambda p: p.mean, default=None))
    return found


def told(point: Point | None) -> str:
    return "" if point is None else f"{point.name}: {mean(list(point.losses), 3)}"


def _compared(heading: str, zeroth: Point | None, rest: Point | None) -> list[str]:
    if zeroth is None or rest is None:
        return []
    return [heading, told(zeroth), told(rest), VERDICTS[verdict(zeroth, rest)]]


HEAD = ["task", "best with zeroth order", "best by gradients alone", "ahead"]


def winners_by_steps(found: Sequence[Found]) -> str:
    rows = [_compared(one.where, *best(one.entries, lambda e: e.losses)) for one in found]
    return markdown([HEAD, *(row for row in rows if row)])


def winners_by_time(found: Sequence[Found]) -> str:
    rows = [
        _compared(
            f"{one.where}: {one.shortest:.0f} {one.unit}",
            *best(one.timed, lambda e, limit=one.shortest: e.after(limit)),  # type: ignore[misc]
        )
        for one in found
        if one.timed
    ]
    return markdown([HEAD, *(row for row in rows if row)])


def amounts(found: Found) -> list[tuple[str, float]]:
    """What the page asks about: the least that anything takes, LoRA's least, and no limit."""
    points = found.memory_points()
    least = min(point.spent for point in points)
    lora = [point.spent for point in points if point.name in (LORA, f"{LORA}, checkpointed")]
    told = [(f"{least / 1e6:.1f}, the least", least)]
    told += [(f"{min(lora) / 1e6:.1f}, LoRA's", min(lora))] if lora else []
    return [*told, ("no limit", math.inf)]


def at_memory(found: Found, amount: float) -> tuple[Point | None, Point | None]:
    """The best that fits: with zeroth order, and by gradients alone."""
    points = [point for point in found.memory_points() if point.spent <= amount]
    zeroth, rest = (
        min((p for p in points if p.hybrid == which), key=lambda p: (p.mean, p.spent), default=None)
        for which in (True, False)
    )
    return zeroth, rest


def winners_by_memory(found: Sequence[Found]) -> str:
    rows = [["task", "MB", *HEAD[1:]]]
    for one in found:
        for name, amount in amounts(one) if one.memory_points() else ():
            zeroth, rest = at_memory(one, amount)
            told_of = (told(zeroth) or "none fits", told(rest) or "none fits")
            rows.append([one.where, name, *told_of, VERDICTS[verdict(zeroth, rest)]])
    return markdown(rows)


def gains(found: Sequence[Found]) -> str:
    """Of zeroth order beside the same first-order part: test losses, the better the higher."""
    rows = [["hybrid", *(one.title for one in found)]]
    for name in names(found):
        entries = [one.entry(name) for one in found]
        if any(entry is not None and entry.recipe.is_hybrid for entry in entries):
            cells = (_gain(*pair) for pair in zip(found, entries, strict=True))
            rows.append([name, *cells])
    return markdown(rows)


def _gain(found: Found, beside: Entry | None) -> str:
    second = None if beside is None else beside.recipe.second
    alone = None if second is None else found.entry(second.name)
    if alone is None or beside is None:
        return ""
    gain = mean_of(alone.losses) - mean_of(beside.losses)
    spread = max(alone.point(alone.losses).spread, beside.point(beside.losses).spread)
    text = f"{gain:+.3f} ({spread:.3f})".replace("-", "\N{MINUS SIGN}")
    return f"**{text}**" if abs(gain) > spread else text


def rates(found: Sequence[Found]) -> str:
    """The best of those searched, first order's then zeroth order's; * at an end of the tried."""
    rows = [["method", *(one.title for one in found)]]
    for name in names(found):
        row = [name]
        for one in found:
            entry = one.entry(name)
            row.append("" if entry is None else _rate(entry))
        rows.append(row)
    return markdown(rows)


def _rate(entry: Entry) -> str:
    given = entry.runs[0]["settings"]
    own = [f"{given[name]:g}" for name in ("lr_fo", "lr_zo") if given[name] is not None]
    return " / ".join(own) + "*" * entry.at_an_end
