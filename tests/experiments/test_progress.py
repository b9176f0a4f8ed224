"""What is said of a run while it trains."""

import io
from types import SimpleNamespace

from rich.console import Console

from experiments.progress import ProgressLines


def lines_of(steps, scored=True, first=0, eval_every=1, **options):
    console = Console(file=io.StringIO(), **options)
    shown = ProgressLines(console, "method 2 of 3, fo-lora", scored)
    state = SimpleNamespace(global_step=first, max_steps=steps)
    shown.on_train_begin(None, state, None)
    for step in range(first + 1, steps + 1):
        state.global_step = step
        shown.on_step_end(None, state, None)
        shown.on_log(None, state, None, logs=dict(loss=1 / step))
        if step % eval_every == 0:
            metrics = dict(eval_loss=0.25, eval_accuracy=0.875)
            shown.on_evaluate(None, state, None, metrics=metrics)
    shown.on_train_end(None, state, None)
    return console.file.getvalue().splitlines()


def test_lines_name_the_method_and_what_the_time_is_of():
    lines = lines_of(2)
    assert lines[0].startswith(
        "method 2 of 3, fo-lora: step 1/2, training loss 1.0000, development 0.2500, 87.5 %, "
    )
    assert lines[0].endswith("s left for this method")
    assert lines[1].endswith(", 0 s left for this method")
    assert "%" not in lines_of(2, scored=False)[0]


def test_ten_lines_a_run():
    assert len(lines_of(400)) == 10
    assert len(lines_of(400, eval_every=100)) == 4
    assert lines_of(400)[-1].startswith("method 2 of 3, fo-lora: step 400/400")


def test_a_bar_fits_a_terminal():
    """Under the name of the run: the steps, the losses, and a time that says what it is."""
    terminal = dict(force_terminal=True, width=80, color_system=None, legacy_windows=False)
    name, *bar = lines_of(2000, eval_every=500, **terminal)
    assert name.strip() == "method 2 of 3, fo-lora"
    (last,) = [line for line in "\r".join(bar).split("\r") if "time left" in line][-1:]
    assert "2000/2000 loss 0.0005  dev 0.2500, 87.5 % time left 0:00:00" in last
    assert "\N{HORIZONTAL ELLIPSIS}" not in last
