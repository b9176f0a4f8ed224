"""docs/side-updates.md: what its own example saves is the model that it trained."""

import pytest
import torch
from doc_blocks import ROOT, sections
from doc_names import ROWS, make_base
from doc_run import fresh_names, run_section

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
torchao = pytest.importorskip("torchao.quantization")

from doc_setup import hub, hub_cache, quiet  # noqa: E402, F401  fixtures

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("hub", "quiet")]


def test_peft_computes_what_the_example_has_trained():
    page = sections(ROOT / "docs" / "side-updates.md")
    example, saving = page[0], next(section for section in page if section.title == "Saving")
    names = fresh_names()
    run_section(example, names)
    model, optimizer = names["model"], names["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 0.1  # moves logits visibly in a few steps
    batch = next(iter(names["loader"]))
    for _ in range(3):
        optimizer.step(lambda: model(**batch).loss)
    run_section(saving, names)

    tokens = torch.tensor([row["input_ids"] for row in ROWS])
    fresh = make_base().requires_grad_(False)
    config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int8)
    torchao.quantize_(fresh.model.decoder.layers, config)
    with torch.no_grad():
        trained, before = model.eval()(tokens).logits, fresh.eval()(tokens).logits
        loaded = peft.PeftModel.from_pretrained(fresh, "side-updates").eval()(tokens).logits
    assert (trained - before).abs().max() > 1e-3
    torch.testing.assert_close(loaded, trained, rtol=1e-5, atol=1e-6)
