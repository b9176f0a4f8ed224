"""A journal in the place of the base's weights, and journals of runs that were saved."""

import copy
import shutil

import pytest
from conftest import same_bits
from tuned_llama import (
    IDS,
    assert_same,
    base_model,
    contents,
    optimizer_of,
    train,
    wrapped,
)

from zofo_optim import (
    Journal,
    load_hybrid,
    replay,
    save_hybrid,
)
from zofo_optim.journal import JournalError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def test_a_journal_in_place_of_base_weights(tmp_path):
    model = wrapped()
    optimizer = optimizer_of(model)
    folder = tmp_path / "here"
    with Journal(tmp_path / "run.zofo").attach(optimizer) as journal:
        train(model, optimizer, 0, 2)
        save_hybrid(model, optimizer, folder, journal=journal)
        wanted = contents(model)
        train(model, optimizer, 2, 3)  # the journal goes on; the folder is of step 2
    assert not (folder / "zo_weights.safetensors").exists()
    fresh, state = load_hybrid(folder, base_model())
    assert_same(fresh, wanted)
    assert state["param_groups"][0]["zo_step"] == 2

    moved = tmp_path / "there" / "deep"
    shutil.copytree(folder, moved)
    with pytest.raises(OSError, match=r"run\.zofo"):
        load_hybrid(moved, base_model())
    shutil.copy(tmp_path / "run.zofo", tmp_path / "there" / "run.zofo")
    assert_same(load_hybrid(moved, base_model())[0], wanted)
    with pytest.raises(JournalError, match="weights that"):
        load_hybrid(folder, base_model(seed=1))


def test_a_journal_that_is_gone(tmp_path):
    model = wrapped()
    optimizer = optimizer_of(model)
    with Journal(tmp_path / "run.zofo").attach(optimizer) as journal:
        train(model, optimizer, 0, 1)
        save_hybrid(model, optimizer, tmp_path / "tuned", journal=journal)
    (tmp_path / "run.zofo").unlink()
    with pytest.raises(FileNotFoundError, match=r"the journal \S+/run\.zofo is missing"):
        load_hybrid(tmp_path / "tuned", base_model())


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_going_on_with_a_journal(kind, perturbation, tmp_path):
    """The journal of the loaded run reaches from the base model to the end."""
    model = wrapped(kind)
    start = copy.deepcopy(model)
    optimizer = optimizer_of(model, perturbation=perturbation)
    with Journal(tmp_path / "run.zofo").attach(optimizer) as journal:
        train(model, optimizer, 0, 2)
        save_hybrid(model, optimizer, tmp_path / "tuned", journal=journal)
    train(model, optimizer, 2, 4)

    fresh, state = load_hybrid(tmp_path / "tuned", base_model())
    other = optimizer_of(fresh, perturbation=perturbation)
    other.load_state_dict(state)
    with Journal(tmp_path / "run.zofo", resume=True).attach(other):
        train(fresh, other, 2, 4)
    assert_same(fresh, contents(model))
    assert replay(start, tmp_path / "run.zofo").verified


def test_a_dropped_estimate_leaves_its_rounding(tmp_path):
    """Moves round; no record of a journal holds them before the next step."""
    model = wrapped()
    start = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    folder = tmp_path / "tuned"
    with Journal(tmp_path / "run.zofo").attach(optimizer) as journal:
        train(model, optimizer, 0, 2)
        at_step = contents(model)
        optimizer.backward(lambda: model(input_ids=IDS[0], labels=IDS[0]).loss)
        optimizer.zero_grad()
        wanted = contents(model)
        assert any(not same_bits(wanted[name], at_step[name]) for name in wanted)
        save_hybrid(model, optimizer, folder, journal=journal)
        shutil.copy(tmp_path / "run.zofo", tmp_path / "as_saved.zofo")
    train(model, optimizer, 2, 3)

    fresh, state = load_hybrid(folder, base_model())
    assert_same(fresh, wanted)
    other = optimizer_of(fresh)
    other.load_state_dict(state)
    with Journal(tmp_path / "as_saved.zofo", resume=True).attach(other):
        train(fresh, other, 2, 3)
    assert_same(fresh, contents(model))
    assert replay(start, tmp_path / "as_saved.zofo").verified


def test_a_journal_of_another_run_is_refused(tmp_path):
    """Of the same base model, at the same place: it would replay well, to other weights."""
    for seed in (1, 2):
        model = wrapped()
        optimizer = optimizer_of(model, seed=seed)
        run = tmp_path / str(seed)
        run.mkdir()
        with Journal(run / "run.zofo").attach(optimizer) as journal:
            train(model, optimizer, 0, 2)
            save_hybrid(model, optimizer, run / "tuned", journal=journal)
    shutil.copy(tmp_path / "1" / "run.zofo", tmp_path / "2" / "run.zofo")
    with pytest.raises(JournalError, match="is not the journal that"):
        load_hybrid(tmp_path / "2" / "tuned", base_model())
    load_hybrid(tmp_path / "1" / "tuned", base_model())


def test_a_journal_that_was_cut_back_is_refused(tmp_path):
    model = wrapped()
    optimizer = optimizer_of(model)
    start, beginning = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    with Journal(tmp_path / "run.zofo").attach(optimizer) as journal:
        train(model, optimizer, 0, 2)
        save_hybrid(model, optimizer, tmp_path / "tuned", journal=journal)
        model.load_state_dict(start)
        with pytest.warns(UserWarning, match="is cut at the optimizer's step 0"):
            optimizer.load_state_dict(beginning)
        train(model, optimizer, 1, 4)  # other batches than before
    with pytest.raises(JournalError, match="is not the journal that"):
        load_hybrid(tmp_path / "tuned", base_model())


def test_a_journal_that_begins_later_does_not_replace_the_weights(tmp_path):
    model = wrapped()
    optimizer = optimizer_of(model)
    with Journal(tmp_path / "first.zofo").attach(optimizer) as journal:
        assert journal.start == 0
        train(model, optimizer, 0, 2)
    with Journal(tmp_path / "second.zofo").attach(optimizer) as journal:
        assert journal.start == 2
        train(model, optimizer, 2, 3)
        folder = save_hybrid(model, optimizer, tmp_path / "tuned", journal=journal)
    loaded, _ = load_hybrid(folder, base_model())
    assert_same(loaded, contents(model))
    with pytest.raises(RuntimeError, match="has no start before attach"):
        _ = Journal(tmp_path / "third.zofo").start
