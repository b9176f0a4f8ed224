"""Fixtures for running the pages: a hub of our own, an empty folder, no GPU, no progress bars."""

import pytest
from doc_names import fill_hub


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory):
    cache = tmp_path_factory.mktemp("hub")
    fill_hub(cache)
    return cache


@pytest.fixture
def hub(hub_cache, monkeypatch):
    """The hub's cache is one that holds the tiny OPT; nothing is looked for elsewhere."""
    import transformers
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if hasattr(transformers.utils.hub, "TRANSFORMERS_CACHE"):  # version 4 keeps its own copy
        monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(hub_cache))


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """Pages write to an empty folder, train on the CPU, and leave accelerate as it was."""
    from accelerate import state

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    state.AcceleratorState._reset_state(True)
    yield
    state.AcceleratorState._reset_state(True)
