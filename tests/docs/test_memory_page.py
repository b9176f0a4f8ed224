"""The tables of docs/memory.md are the committed estimates and measurements."""

import json

from doc_blocks import ROOT
from test_numbers import rows

RESULTS = ROOT / "experiments" / "results" / "memory"
TABLE = rows((ROOT / "docs" / "memory.md").read_text(encoding="utf-8"))


def test_peaks_of_large_models():
    peaks = json.loads((RESULTS / "sizes.json").read_text())["peaks"]
    for weights in ("bf16", "int8", "int4"):
        start = next(k for k, line in enumerate(TABLE) if line[0] == weights)
        assert TABLE[start][1:] == [name.removeprefix("Llama-") for name in peaks]
        methods = peaks["Llama-2-7B"][weights]
        for k, method in enumerate(methods, start + 1):
            found = [f"{peaks[name][weights][method] / 1e9:.1f}" for name in peaks]
            assert TABLE[k] == [method, *found]


def test_measured_beside_estimated():
    measured = json.loads((RESULTS / "measured.json").read_text())["rows"]
    start = next(k for k, line in enumerate(TABLE) if line[0] == "small model")
    head, shown = TABLE[start], {line[0]: line[1:] for line in TABLE[start + 1 :]}
    assert 2 * len(measured) == sum(map(len, shown.values()))
    for row in measured:
        cells = dict(zip(head[1:], shown[f"{row['method']}, {row['weights']}"], strict=True))
        for key in ("estimated", "measured"):
            assert cells[f"{row['model']}, {key}"] == f"{row[key] / 1e6:.1f}"
        assert abs(row["estimated"] / row["measured"] - 1) < 0.02
