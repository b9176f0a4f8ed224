"""What is printed of results with known scores."""

import io

from known_results import RESULTS, result
from rich.console import Console
from small_models import quick_collections

from experiments import summary


def with_start(results, accuracy, loss=4.0, examples=100):
    """As runs of today, which know the untrained model's scores."""
    scores = dict(accuracy=accuracy, loss=loss, f1=accuracy / 2)
    return [{**r, "untrained": scores, "test_examples": examples} for r in results]


APART = [
    *(result("zo", seed, [4, 3.5], accuracy=0.5) for seed in (0, 1)),
    *(result("fo-lora", seed, [4, 2.5], accuracy=0.69 + seed / 100) for seed in (0, 1)),
    *(result("hybrid-lora", seed, [4, 2.3], accuracy=0.8 + seed / 100) for seed in (0, 1)),
]


def test_the_best_method():
    assert summary.verdict(with_start(APART, 0.5)) == (
        "Best on the test examples: hybrid-lora, accuracy 80.5 %; untrained: 50.0 % "
        "(standard error 4.0 points, of 100 examples)."
    )
    sentences = with_start([{**r, "scored": False} for r in APART], 0.5)
    assert summary.verdict(sentences) == (
        "Best on the test examples: hybrid-lora, loss 3.300; untrained: 4.000."
    )


def test_methods_that_tie():
    """Within the deviation of seeds; or, of one seed, within the standard error of the accuracy."""
    assert summary.verdict(with_start(RESULTS, 0.5)) == (
        "Tied on the test examples, within the spread: accuracy of hybrid-lora 80.0 %, of fo-lora "
        "75.0 %; untrained: 50.0 % (standard error 4.0 points, of 100 examples)."
    )
    losses = summary.verdict([{**r, "scored": False} for r in RESULTS])
    assert losses.startswith("Tied on the test examples, within the spread: loss of ")
    assert "of fo-lora 2.600" in losses
    assert "of hybrid-lora 2.600" in losses
    assert "zo" not in losses
    one_seed = [
        result("fo-lora", 0, [4, 2], accuracy=0.79),
        result("hybrid-lora", 0, [4, 2], accuracy=0.76),
        result("zo", 0, [4, 2], accuracy=0.74),
    ]
    tie = "accuracy of fo-lora 79.0 %, of hybrid-lora 76.0 %; untrained"
    assert tie in summary.verdict(with_start(one_seed, 0.5))
    assert "Best on the test examples: fo-lora" in summary.verdict(
        with_start(one_seed, 0.5, examples=1000)
    )


def test_nothing_learned():
    assert summary.verdict(with_start(APART, 0.9, loss=3.0)) == (
        "Nothing learned: no method has a better accuracy on the test examples than the "
        "untrained model, 90.0 % (standard error 4.0 points, of 100 examples)."
    )
    sentences = with_start([{**r, "scored": False} for r in APART], 0.5)
    assert summary.verdict([{**r, "untrained": LOW} for r in sentences]) == (
        "Nothing learned: no method has a better loss on the test examples than the "
        "untrained model, 2.000."
    )


def test_the_loss_fell_and_only_the_accuracy_stands_still():
    assert summary.verdict(with_start(APART, 0.9)) == (
        "No method has a better accuracy on the test examples than the untrained model, 90.0 %; "
        "but the test loss fell from 4.000 to 3.300 with hybrid-lora (standard error 4.0 points, "
        "of 100 examples)."
    )


def test_a_loss_that_is_no_number_is_not_the_best():
    nan = float("nan")
    lost = {**result("zo", 0, [4, 3]), "test": dict(loss=nan, accuracy=0.5, f1=0.5)}
    fine = result("fo-lora", 0, [4, 2])
    found = summary.verdict([{**r, "scored": False} for r in (lost, fine)])
    assert found == "Best on the test examples: fo-lora, loss 3.000."


def test_a_start_that_has_seen_the_labels_is_called_a_probe():
    results = [{**r, "head": "probe"} for r in with_start(APART, 0.5)]
    assert "; fitted probe: 50.0 % (" in summary.verdict(results)
    lines = printed(results).splitlines()
    assert lines[5].split() == ["fitted", "probe", "50.0", "4.000", "2.000"]
    assert not any("untrained" in line for line in lines)
    (legend,) = [line for line in lines if line.startswith("fitted probe: ")]
    assert "fitted on the training examples and their labels" in legend
    better = [{**r, "head": "probe"} for r in with_start(APART, 0.9, loss=3.0)]
    assert "than the fitted probe, 90.0 %" in summary.verdict(better)
    prompts = [{**r, "head": "prompts"} for r in with_start(APART, 0.5)]
    assert "fitted probe" not in printed(prompts)


LOW = dict(accuracy=0.5, loss=2.0, f1=0.5)


def test_verdict_on_results_that_do_not_know_the_start():
    assert summary.verdict(APART) == "Best on the test examples: hybrid-lora, accuracy 80.5 %."


def printed(results):
    console = Console(file=io.StringIO())
    summary.print_table(console, results, "a title")
    return console.file.getvalue()


def test_the_printed_table():
    lines = printed(with_start(RESULTS, 0.5)).splitlines()
    assert lines[0].strip() == "a title"
    assert lines[2].split() == ["test", "test", "training", "peak"]
    assert lines[3].split()[:3] == ["method", "accuracy,", "%"]
    assert lines[5].split() == ["untrained", "50.0", "4.000", "2.000"]
    assert lines[6].split() == [
        "zo",
        "50.0",
        "±",
        "0.0",
        "4.300",
        "±",
        "0.141",
        "1.650",
        "±",
        "0.071",
        "20",
        "2.000",
        "5",
    ]
    assert lines[8].split()[0] == "hybrid-lora"
    assert any(line.startswith("peak MB: the most that tensors (weights, ") for line in lines)
    assert lines[-1].startswith("Tied on the test examples, within the spread: ")
    old = printed(RESULTS).splitlines()
    assert old[5].split()[0] == "zo"
