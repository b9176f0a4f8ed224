"""The tables of docs/memory.md are the committed estimates and measurements."""

import json

from doc_blocks import ROOT
from test_numbers import rows

from experiments.memory import tables
from experiments.memory.resident import BATCH, config
from experiments.memory.sizes import WEIGHTS
from experiments.memory.sizes import config as llama
from zofo_optim.memory import estimate_memory
from zofo_optim.memory.made import without_data
from zofo_optim.memory.rehearsed_visits import VisitingDevice

RESULTS = ROOT / "experiments" / "results" / "memory"
PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
TABLE = rows(PAGE)


def test_peaks_of_large_models():
    peaks = json.loads((RESULTS / "sizes.json").read_text())["peaks"]
    for weights in WEIGHTS:
        start = next(k for k, line in enumerate(TABLE) if line[0] == weights)
        assert TABLE[start][1:] == [name.removeprefix("Llama-") for name in peaks]
        methods = peaks["Llama-2-7B"][weights]
        for k, method in enumerate(methods, start + 1):
            found = [f"{peaks[name][weights][method] / 1e9:.1f}" for name in peaks]
            assert TABLE[k] == [method.removesuffix(", offloaded"), *found]


def test_errors_by_kind():
    """As many lines as there are kinds, those of the results."""
    found = tables.read(RESULTS)
    summary = rows("\n".join(tables.summary(found)))
    start = TABLE.index(summary[0])
    assert TABLE[start : start + len(summary)] == summary
    assert "\n".join(tables.summary(found)) in (RESULTS / "table.md").read_text(encoding="utf-8")


def test_estimates_are_near():
    """Within 2 %, in the first step too; within 10 % of resident memory."""
    found = tables.read(RESULTS)
    assert {"measured", "offloaded"} <= found.keys()
    for part, cases in found.items():
        within = 0.02 if part == "measured" else 0.1
        for row in cases:
            assert abs(tables.error_of(row)) < within, row
            if row["method"].startswith(("zo", "hybrid")):
                assert abs(tables.error_of(row, "_first")) < within, row


def test_the_model_that_was_offloaded():
    size = estimate_memory(config(), "lora", BATCH, weights="fp32", offloaded=True, device="cpu")
    assert f"a Llama of {size.on_disk / 1e6:.0f} MB in fp32" in PAGE


def test_what_the_host_has():
    away = VisitingDevice(without_data(llama("Llama-2-70B")).bfloat16().requires_grad_(False))
    peaks = json.loads((RESULTS / "sizes.json").read_text())["peaks"]["Llama-2-70B"]
    on_device = peaks["bf16, visiting a GPU"]["zo, streamed, offloaded"] / 1e9
    told = f"takes {on_device:.1f} GB there for 70 B in 16 bits, beside {away.nbytes / 1e9:.0f} GB"
    away.remove()
    assert told in PAGE
