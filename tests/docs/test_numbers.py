"""Numbers in the pages are those of the committed results."""

import json
import re
from itertools import pairwise

import pytest
from doc_blocks import ROOT

CPU = ROOT / "benchmarks" / "results" / "cpu"
RESULTS = ROOT / "experiments" / "results"
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
TO, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
STEPS = {
    "hybrid, two-sided": ("hybrid, two-sided", "zofo gaussian"),
    "hybrid, one-sided": ("hybrid, one-sided", "zofo gaussian"),
    "ZO only, two-sided": ("ZO, two-sided", "zofo gaussian"),
    "ZO only, one-sided": ("ZO, one-sided", "zofo gaussian"),
    "FO-LoRA": ("FO-LoRA", "zofo"),
    "MeZO's recipe": ("ZO, two-sided", "MeZO"),
}
MODELS = {
    "MiniLM, dropout": ("step", "dropout"),
    "MiniLM, none": ("step", "no dropout"),
    "4 M-parameter Llama, fp32": ("causal_lm", "Llama, 4 layers of 256 float32"),
    "the same, bf16": ("causal_lm", "Llama, 4 layers of 256 bfloat16"),
}


def rows(text):
    """Cells of the lines of Markdown tables."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and not re.fullmatch(r"[|\s-]+", line)
    ]


def section(title):
    return PERFORMANCE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def comparison(benchmark, case, **wanted):
    cases = json.loads((CPU / f"{benchmark}.json").read_text())["cases"]
    (found,) = [
        c
        for entry in cases
        if entry["name"] == case
        for c in entry["comparisons"]
        if all(c[key] == value for key, value in wanted.items())
    ]
    return found


def percent(found):
    """As the page writes an overhead."""
    median, low, high = (round(100 * found[key]) for key in ("median", "p20", "p80"))
    return f"+{median} % ({low}{TO}{high})".replace("(-", f"({MINUS}")


def ratio(found):
    return "{median:.2f} ({p20:.2f}{to}{p80:.2f})".format(to=TO, **found)


@pytest.mark.parametrize("step", STEPS)
def test_overheads(step):
    head, *lines = rows(section("One step"))
    (line,) = [line for line in lines if line[0] == step]
    assert head[1:] == list(MODELS)
    case, top = STEPS[step]
    for cell, (benchmark, model) in zip(line[1:], MODELS.values(), strict=True):
        found = comparison(benchmark, f"{case}, {model}", name="overhead", top=top)
        assert cell == percent(found)


def test_the_readme_s_numbers():
    shown = re.findall(r"\*\*(\d+) %\*\*", README.split("\n## ")[0])
    tops = [("hybrid", "zofo gaussian"), ("ZO", "zofo gaussian"), ("ZO", "MeZO")]
    cases = [
        comparison("step", f"{kind}, two-sided, dropout", name="overhead", top=top)
        for kind, top in tops
    ]
    assert shown == [str(round(100 * found["median"])) for found in cases]


def test_streamed():
    _, *lines = rows(section("Streamed against in place"))
    models = ["MiniLM float32", "Llama float32", "Llama bfloat16"]
    cases = json.loads((CPU / "streamed.json").read_text())["cases"]
    assert len(lines) == 4
    for kind, *cells in lines:
        what, noise = kind.replace("ZO only", "ZO").split(", ")
        for cell, model in zip(cells, models, strict=True):
            name, dtype = model.split()
            (entry,) = [
                c
                for c in cases
                if c["name"].startswith(f"{what}, two-sided")
                and name in c["name"]
                and c["name"].endswith(dtype)
            ]
            (found,) = [
                c
                for c in entry["comparisons"]
                if c["top"] == f"zofo {noise.lower()}, streamed"
                and c["bottom"] == f"zofo {noise.lower()}, in place"
            ]
            assert cell == ratio(found), entry["name"]


def test_populations():
    """A line a case, cells by rank: of the evaluation, the step and its memory; then one pair."""
    _, *lines = rows(section("A population in one generate()"))
    entries = json.loads((CPU / "population.json").read_text())["cases"]
    assert len(lines) == len(entries)
    for line, entry in zip(lines, entries, strict=True):
        size, found = entry["sizes"], entry["comparisons"]
        kind = {"float32": "fp32", "bfloat16": "bf16"}[size["dtype"]]
        cells = [f"{size['width']}, {size['rows']} rows, {kind}, {size['new_tokens']}"]
        for rank in (1, 4):
            for part in ("evaluation", "step"):
                (kept,) = [
                    c
                    for c in found
                    if c["name"] == "tokens a second kept"
                    and c["shown_at"] == f"zofo rank {rank}, {part}"
                ]
                cells.append(ratio(kept))
        for rank in (1, 4):
            (over,) = [
                c
                for c in found
                if c["of"] == "peak_bytes" and c["shown_at"] == f"zofo rank {rank}, step"
            ]
            cells.append(f"{100 * over['median']:+.1f} %".replace("-", MINUS))
        (faster,) = [
            c
            for c in found
            if c["name"].startswith("one full") and c["shown_at"] == "zofo rank 1, step"
        ]
        cells.append(f"{faster['median']:.0f} {TIMES}")
        assert line == cells, entry["name"]


def _scaling(title):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    return tables(page.split(f"\n## {title}\n")[1].split("\n## ")[0])


def test_steps_by_several_processes():
    """A line for the arithmetic alone, then one a strategy."""
    ranks = json.loads((CPU / "distributed.json").read_text())["ranks"]
    (_, alone, *lines) = _scaling("Measured")[0]
    forwards = [ranks[count]["parts"]["forward"]["seconds"] for count in "124"]
    over = forwards[2]["median"] / forwards[0]["median"]
    assert alone[2:6] == [*map(ratio, forwards), f"{over:.2f}"]
    assert [line[0] for line in lines] == list(ranks["4"]["steps"])
    for line in lines:
        one, two, four = (ranks[count]["steps"][line[0]] for count in "124")
        assert line[1] == f"{four['bytes']:,}"
        assert line[2:5] == [ratio(found["seconds"]) for found in (one, two, four)]
        assert line[5] == f"{four['over_first']:.2f}"
        over = [found["predicted"]["over_measured"] for found in (one, two, four)]
        assert line[6] == ", ".join(f"{value:.2f}" for value in over)


def test_projections():
    result = json.loads((CPU.parent / "projected" / "scaling.json").read_text())
    fast, slow = (network["name"] for network in result["networks"])
    found = {
        (p["network"], p["model"], p["gpus"], p["strategy"]): f"{1e3 * p['seconds']:,.0f}"
        for p in result["points"]
    }
    columns = [(fast, "7B", gpus) for gpus in (1, 64, 1024)]
    columns += [(fast, "70B", gpus) for gpus in (8, 1024)]
    columns += [(slow, model, 1024) for model in ("7B", "70B")]
    (_, *lines) = _scaling("Projected")[0]
    assert [line[0] for line in lines] == list(dict.fromkeys(key[3] for key in found))
    for name, *cells in lines:
        assert cells == [found.get((*column, name), "") for column in columns]


def test_instructions():
    counted = json.loads((CPU.parent / "sm_90" / "sass.json").read_text())

    def count(kernel, distribution, rounding):
        (row,) = [
            row
            for row in counted
            if (row["kernel"], row["distribution"], row["rounding"], row["dtype"])
            == (kernel, distribution, rounding, "bfloat16")
        ]
        assert row["spill_bytes"] == 0
        return f"{row['instructions_per_element']:.1f}"

    low_rank = {line[0]: line[3] for line in rows(section("The Triton kernels"))}
    table = {line[0]: line[1:3] for line in rows(section("The Triton kernels"))}
    kinds = ("gaussian", "rademacher")
    for name in ("perturb", "recover and perturb"):
        kernel = name.replace(" ", "_")
        assert table[name] == [count(kernel, kind, "nearest") for kind in kinds]
    update = "restore_and_update"
    nearest = table["restore and update, to nearest"]
    stochastic = table["the same, rounded stochastically (default)"]
    assert nearest == [count(update, kind, "nearest") for kind in kinds]
    assert stochastic == [count(update, kind, "stochastic") for kind in kinds]
    update += ", rank 1"
    assert low_rank["perturb"] == count("perturb, rank 1", None, "nearest")
    assert low_rank["recover and perturb"] == count("recover_and_perturb, rank 1", None, "nearest")
    assert low_rank["restore and update, to nearest"] == count(update, None, "nearest")
    assert low_rank["the same, rounded stochastically (default)"] == count(
        update, None, "stochastic"
    )


NAMES = {
    "SST-2": "sst2",
    "sentences": "sst2-sentences",
    "COPA": "copa",
    "WinoGrande": "winogrande",
    "WiC": "wic",
}
MOST_COLUMNS = 6  # of results that the site shows without a scrollbar


def table(model, title):
    text = (RESULTS / model / "table1.md").read_text(encoding="utf-8")
    return rows(text.split(f"\n## {title}\n")[1].split("\n## ")[0])


def tables(text):
    """Of the section, each as rows."""
    return [rows(part) for part in re.split(r"\n{2,}", text) if part.startswith("|")]


@pytest.mark.skipif(not RESULTS.is_dir(), reason="the study's results are not here")
@pytest.mark.parametrize("path", ["README.md", "docs/results.md"])
def test_tables_of_results(path):
    """A table a model, a line a method, a column a task."""
    text = (ROOT / path).read_text(encoding="utf-8")
    shown = [found for found in tables(text) if found[0][0] == "method"]
    sources = [table("minilm", "Test accuracy, %"), table("stories260k", "Test loss")]
    for ours, source in zip(shown, sources, strict=True):
        turned = [[NAMES.get(cell, cell) for cell in line] for line in zip(*ours, strict=True)]
        turned[0][0] = "task"
        assert turned == source
        assert len(ours[0]) <= MOST_COLUMNS


@pytest.mark.skipif(not (RESULTS / "rewards").is_dir(), reason="the study's results are not here")
def test_scores_of_generated_text():
    """Lines that begin with a method are those of the committed table, in the columns named."""
    source = (RESULTS / "rewards" / "table.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    shown = page.split("\n## Scores of generated text\n")[1].split("\n## ")[0]
    found = 0
    for head, *lines in tables(shown):
        part = source.split(f"\n## {head[0]}\n")[1].split("\n## ")[0]
        names, *others = tables(part.strip())[0]
        own = {line[0]: dict(zip(names, line, strict=True)) for line in others}
        for method, *cells in lines:
            for name, cell in zip(head[1:], cells, strict=True):
                assert cell == own[method][name], (head[0], method, name)
                found += 1
    assert found > 60


@pytest.mark.skipif(not (RESULTS / "partition").is_dir(), reason="the study's results are not here")
def test_where_hybrid_training_pays():
    """Lines of tables of a model are those of the committed table, in the columns named."""
    source = (RESULTS / "partition" / "table.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    shown = page.split("\n## Where hybrid training pays\n")[1].split("\n## ")[0]
    found = 0
    for head, *lines in tables(shown):
        if f"\n## {head[0]}, " not in source:
            continue
        part = source.split(f"\n## {head[0]}, ")[1].split("\n## ")[0]
        own = {}
        for names, *others in tables(part):
            if names[0] == "recipe":
                own.update({line[0]: dict(zip(names, line, strict=True)) for line in others})
        for recipe, *cells in lines:
            for name, cell in zip(head[1:], cells, strict=True):
                assert cell == own[recipe][name], (head[0], recipe, name)
                found += 1
    assert found > 40
    costs = (RESULTS / "partition" / "costs.md").read_text(encoding="utf-8")
    (head, *lines) = next(one for one in tables(shown) if one[0][0] == "budget")
    names, *others = tables(costs.split("\nBudgets of memory:\n")[1].strip())[0]
    own = [dict(zip(names, line, strict=True)) for line in others]
    assert lines == [[line[name] for name in head] for line in own]


@pytest.mark.skipif(not (RESULTS / "quantized").is_dir(), reason="the results are not here")
def test_quantised_bases():
    made = (RESULTS / "quantized" / "table.md").read_text(encoding="utf-8").splitlines()
    page = (ROOT / "docs" / "quantized.md").read_text(encoding="utf-8")
    section = page.split("## Does it learn?")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(shown) > 15
    assert [line for line in shown if line not in made] == []


@pytest.mark.skipif(not (RESULTS / "transfer").is_dir(), reason="the study's results are not here")
def test_carried_adapters():
    """Lines of tables of a model and a task are those of the committed table."""
    source = (RESULTS / "transfer" / "table.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    found = 0
    for head, *lines in tables(page.split("\n## Carried adapters\n")[1].split("\n## ")[0]):
        part = source.split(f"\n## {head[0]}\n")[1].split("\n### ")[0]
        names, *others = tables(part.strip())[0]
        own = {line[0]: dict(zip(names, line, strict=True)) for line in others}
        for method, *cells in lines:
            for name, cell in zip(head[1:], cells, strict=True):
                assert cell == own[method][name], (head[0], method, name)
                found += 1
    assert found > 20


@pytest.mark.skipif(not (RESULTS / "theory").is_dir(), reason="the study's results are not here")
def test_figures_of_theory():
    """Lines are those of the committed table that has the columns named."""
    sources = tables((RESULTS / "theory" / "table.md").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    found = 0
    for title in ("Smoothness", "Two learning rates"):
        for head, *lines in tables(page.split(f"\n## {title}\n")[1].split("\n## ")[0]):
            (source,) = [one for one in sources if set(head) <= set(one[0])]
            own = [dict(zip(source[0], line, strict=True)) for line in source[1:]]
            for line in lines:
                shown = dict(zip(head, line, strict=True))
                assert any(shown.items() <= one.items() for one in own), line
                found += len(line)
    assert found > 100


def test_there_are_no_columns_without_numbers():
    """What nothing was measured for is left out."""
    for path in (ROOT / "docs").glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert "not measured" not in text, path.name
        for first, second in pairwise(text.splitlines()):
            if first.startswith("|") and second.startswith("|"):
                assert first.count("|") == second.count("|"), f"{path.name}: {second}"


def test_offloading():
    """A line a method: growth of resident memory in memory and offloaded, and the ratio of time."""
    page = (ROOT / "docs" / "offload.md").read_text(encoding="utf-8")
    content = json.loads((CPU / "offload.json").read_text())
    found = {(case["method"], case["weights_in"]): case for case in content["cases"]}
    lines = rows(page.split("\n| limited ")[0])[1:]
    assert {method for method, _ in found} == {line[0] for line in lines}
    for method, *cells in lines:
        resident, offloaded = found[method, "memory"], found[method, "offloaded"]
        assert resident["loss"] == offloaded["loss"]
        megabytes = [f"{case['stepping'] / 1e6:.0f} MB" for case in (resident, offloaded)]
        ratio = offloaded["step_processor"] / resident["step_processor"]
        assert cells == [*megabytes, f"{ratio:.2f}"]
    (size,) = {case["weights"] for case in content["cases"]}
    assert f"{size / 1e6:.0f} MB of weights" in page


def test_offloading_under_a_limit():
    """A line a method: killed with its weights in memory, the same losses with them offloaded."""
    page = (ROOT / "docs" / "offload.md").read_text(encoding="utf-8")
    cases = json.loads((CPU / "offload_limited.json").read_text())["cases"]
    (limit,) = {case["limit"] for case in cases} - {None}
    assert f"{limit / 1e6:.0f} MB more" in page
    found = {(c["method"], c["weights_in"], c["limit"] is not None): c for c in cases}
    lines = rows("| limited " + page.split("\n| limited ")[1])[1:]
    assert {method for method, *_ in found} == {line[0] for line in lines}
    for method, *cells in lines:
        free, limited = found[method, "offloaded", False], found[method, "offloaded", True]
        assert limited["losses"] == free["losses"] == found[method, "memory", False]["losses"]
        assert limited["weights"] > limit
        assert (found[method, "memory", True]["ended"], limited["ended"]) == ("killed", "done")
        read, ratio = limited["read_in_a_step"], limited["step_processor"] / free["step_processor"]
        assert cells == ["killed", "trains", f"{read / 1e6:.0f} MB", f"{ratio:.2f}"]
