"""The page of engines runs where vLLM is."""

import pytest
from doc_blocks import ROOT, sections
from doc_names import make_tokenizer
from doc_run import fresh_names, run_section

transformers = pytest.importorskip("transformers")
pytest.importorskip("vllm", reason="vLLM is not here: make vllm makes an environment with it")


def test_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    model = transformers.LlamaForCausalLM(config)
    start = {name: p.clone() for name, p in model.state_dict().items()}
    names = fresh_names({"model": model, "tokenizer": make_tokenizer()})
    for section in sections(ROOT / "docs" / "engines.md"):
        run_section(section, names)
    assert [0 < len(tokens) <= 16 for tokens in names["completions"]] == [True] * 8
    moved = {name for name, p in model.state_dict().items() if not (p == start[name]).all()}
    assert moved == {name for name in start if name.endswith("proj.weight")}
    names["llm"].llm_engine.engine_core.shutdown()
