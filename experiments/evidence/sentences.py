"""Sentences of the page whose numbers are drawn: counts of who is ahead, and what is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..partition.recipes import ALL, GAUSSIAN, LORA, PER_EXAMPLE, PLAIN, Recipe
from ..partition.regions import LOSES, TIES, WINS, verdict
from .found import Entry, Found
from .grid import STUDIES, cells
from .tables import amounts, at_memory, best


def summary(found: Sequence[Found]) -> str:
    """A bullet for each question."""
    timed = [one for one in found if one.timed]
    steps = [_verdict(one.entries, lambda entry: entry.losses) for one in found]
    after = [
        _verdict(one.timed, lambda entry, limit=one.shortest: entry.after(limit)) for one in timed
    ]
    ahead, behind, compared = _beside(found)
    return "\n".join(
        [
            f"- *At equal steps*, {len(found)} comparisons: {_counted(steps)}. "
            + _with_full([one.entries for one in found], steps),
            f"- *At equal time*, {len(timed)} comparisons: {_counted(after)}. "
            + _with_full([one.timed for one in timed], after),
            f"- *At equal memory*: {_memory([one for one in found if one.memory_points()])}",
            "- *Beside the same first-order part*, zeroth order in the rest lowers the test loss "
            f"by more than the spread in {ahead} of {compared} comparisons, and raises it in "
            f"{behind}.",
        ]
    )


def _with_full(compared: Sequence[Sequence[Entry]], verdicts: Sequence[str | None]) -> str:
    """Whether the strongest reference was there."""
    there = [any(entry.recipe.first == ALL for entry in entries) for entries in compared]
    tied = [full for full, found in zip(there, verdicts, strict=True) if found == TIES]
    return (
        f"Full fine-tuning was run in {sum(there)} of them, and in {sum(tied)} of the {len(tied)} "
        "within the spread."
    )


def _verdict(entries: Sequence[Entry], values: object) -> str | None:
    zeroth, rest = best(entries, values)  # type: ignore[arg-type]
    return None if zeroth is None or rest is None else verdict(zeroth, rest)


def _counted(verdicts: Iterable[str | None]) -> str:
    told = {
        LOSES: "gradients alone are ahead on",
        WINS: "a method with zeroth order is ahead on",
        TIES: "within the spread on",
    }
    counts = Counter(verdicts)
    return ", ".join(f"{words} {counts[name]}" for name, words in told.items())


def _memory(found: Sequence[Found]) -> str:
    """What fits in the least memory, and who is ahead in LoRA's least."""
    alone, verdicts = 0, []
    for one in found:
        (_, least), *more = amounts(one)
        alone += at_memory(one, least)[1] is None
        verdicts += [verdict(*at_memory(one, amount)) for _, amount in more[:-1]]
    return (
        f"in {alone} of {len(found)} comparisons the least memory is enough for zeroth order only. "
        f"In LoRA's, checkpointed where that is measured: {_counted(verdicts)}."
    )


def _beside(found: Sequence[Found]) -> tuple[int, int, int]:
    ahead = behind = compared = 0
    for one in found:
        for entry in one.entries:
            second = entry.recipe.second
            alone = None if second is None else one.entry(second.name)
            if alone is not None:
                compared += 1
                which = verdict(entry.point(entry.losses), alone.point(alone.losses))
                ahead += which == WINS
                behind += which == LOSES
    return ahead, behind, compared


def _factors(numerators: Iterable[tuple[float, float]], digits: int = 1) -> str:
    """The least and the greatest of the ratios."""
    found = sorted(upper / lower for upper, lower in numerators)
    if not found:
        return "(not measured)"
    low, high = f"{found[0]:.{digits}f}", f"{found[-1]:.{digits}f}"
    return low if low == high else f"{low} to {high}"


def memory_of_zeroth_order(grid: Sequence[Found]) -> str:
    """Against a forward pass, where that is measured."""
    pairs = [
        (entry.costs[PLAIN]["peak_bytes"], one.forward["peak_bytes"])
        for one in grid
        if one.forward and (entry := one.entry(Recipe(kind=GAUSSIAN).name)) and PLAIN in entry.costs
    ]
    return (
        f"Zeroth order along Gaussian directions trains in {_factors(pairs, 2)} times the memory "
        f"of a forward pass ({len(pairs)} tasks)."
    )


def memory_of_lora(found: Sequence[Found]) -> str:
    """Against the least that anything takes; checkpointed, and plain."""
    spent = [{point.name: point.spent for point in one.memory_points()} for one in found]
    plain, saved = (
        [(points[name], min(points.values())) for points in spent if name in points]
        for name in (LORA, f"{LORA}, checkpointed")
    )
    return (
        f"LoRA takes {_factors(plain)} times the least memory that anything takes, checkpointed "
        f"{_factors(saved)} times."
    )


def directions(found: Sequence[Found]) -> str:
    """Those for each example against Gaussian ones, alone."""
    verdicts = []
    for one in found:
        own, shared = (one.entry(Recipe(kind=kind).name) for kind in (PER_EXAMPLE, GAUSSIAN))
        if own and shared:
            # the question is put as if the first were the hybrid
            verdicts.append(verdict(own.point(own.losses), shared.point(shared.losses)))
    return (
        f"With a direction for each example zeroth order alone ends at a lower test loss than with "
        f"Gaussian ones, by more than the spread, in {verdicts.count(WINS)} of {len(verdicts)} "
        f"comparisons; at a higher one in {verdicts.count(LOSES)}."
    )


def time_of_steps(grid: Sequence[Found]) -> str:
    """Of the main methods' steps, in forward passes."""
    names = ("full", "LoRA", "LoRA, checkpointed", "ZO Gaussian", "ZO per example")
    told = []
    for name in names:
        first, _, saved = name.partition(", ")
        passes = [
            cost["passes"]
            for one in grid
            for entry in one.entries
            if entry.name == first
            for saving, cost in entry.costs.items()
            if saving.name == saved and "passes" in cost
        ]
        told.append(f"{name} {_factors((value, 1.0) for value in passes)}")
    return f"A step takes, in forward passes: {', '.join(told)}."


def unfinished(found: Sequence[Found]) -> str:
    """What of the grid has no committed results; nothing where all is there."""
    parts = []
    for study in STUDIES:
        there = next((one for one in found if one.study == study), None)
        names = [entry.name for entry in there.entries] if there else []
        missing = [cell.name for cell in cells(study) if cell.name not in names]
        if missing:
            told = ", ".join(missing) if names else "all"
            parts.append(f"{study.task} on {study.model} ({told})")
    if not parts:
        return "All runs of the grid are there."
    return f"Of the grid, not run yet and blank below: {'; '.join(parts)}."


def protocol(found: Sequence[Found]) -> str:
    """Sizes of the runs, as the results say them."""
    given = [one.entries[0].runs[0]["settings"] for one in found]
    count = sum(len(entry.runs) for one in found for entry in one.entries)
    steps = "; ".join(
        f"{one.title}: {settings['steps']}" for one, settings in zip(found, given, strict=True)
    )
    sizes = f"{given[0]['train']} training, {given[0]['dev']} development"
    return (
        f"{given[0]['batch']} examples a step, {count} runs at the best rates; at most {sizes} and "
        f"{given[0]['test']} test examples. Steps: {steps}."
    )
