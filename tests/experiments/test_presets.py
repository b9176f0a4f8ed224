"""The learning rates of the paper's Table 2, by model, method and task."""

from experiments import presets, tasks
from experiments.methods import PAPER_METHODS


def test_presets_of_the_paper():
    for model, rows in presets.PAPER.items():
        assert set(rows) == set(PAPER_METHODS)
        for method in PAPER_METHODS:
            needed = {"lr_zo": method[:2] != "fo", "lr_fo": method != "zo"}
            for task in tasks.TASKS:
                found = presets.preset(f"some/{model}-hf", method, task)
                for rate, needs in needed.items():
                    assert (rate in found) == needs
                    assert not needs or 0 < found[rate] < 1
                assert found["steps"] == 20_000
                assert found["optimizer"] == "sgd"
    found = presets.preset("facebook/opt-1.3b", "hybrid-prompt", "sst2")
    assert (found["lr_fo"], found["lr_zo"]) == (1e-3, 1e-7)
    assert presets.guesses("facebook/opt-1.3b", "fo-prompt", "sst2") == []
    assert presets.guesses("facebook/opt-1.3b", "hybrid-lora", "sst2") == [
        "hybrid-lora: --lr-zo 1e-06 is typical, its own is illegible"
    ]
    assert "not of wic" in presets.guesses("opt-1.3b", "fo-prompt", "wic")[0]
    found = presets.preset("meta-llama/Llama-2-7b-hf", "fo-lora", "winogrande")
    assert found["lr_fo"] == 1e-2
    assert presets.preset("gpt2", "zo", "sst2") == {}
    assert presets.preset("facebook/opt-1.3b", "fo", "sst2") == presets.SCHEME
    assert presets.guesses("facebook/opt-1.3b", "fo", "sst2") == []
