"""HybridTrainerMixin on TRL's trainers."""

import pytest

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from tiny_llama import (  # noqa: E402
    TOKENS,
    arguments,
    base_model,
    vars_of,
    word_tokenizer,
)
from trained_llama import (  # noqa: E402
    logged,
)

from zofo_optim.trainer import HybridTrainerMixin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_trl(tmp_path):
    """The mixin on SFTTrainer; its counts are of one evaluation a step."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class HybridSFTTrainer(HybridTrainerMixin, trl.SFTTrainer):
        pass

    texts = [" ".join(f"w{i}" for i in row) for row in TOKENS.tolist()]
    data = datasets.Dataset.from_dict(dict(text=texts))

    def run(cls, **more):
        config = trl.SFTConfig(**{**vars_of(arguments(tmp_path)), "max_length": 16})
        done = cls(
            base_model(),
            args=config,
            train_dataset=data,
            processing_class=word_tokenizer(),
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=2),
            **more,
        )
        done.train()
        return done

    ours, theirs = run(HybridSFTTrainer, zo=dict(lr=1e-3)), run(trl.SFTTrainer)
    assert logged(ours, "num_tokens") == logged(theirs, "num_tokens")
    assert logged(ours, "loss")[0] == logged(theirs, "loss")[0]
    assert logged(ours, "entropy")[0] == logged(theirs, "entropy")[0]
    assert logged(ours, "loss")[1:] != logged(theirs, "loss")[1:]


def preferences():
    datasets = pytest.importorskip("datasets")
    texts = [[f" w{i}" for i in row] for row in TOKENS.tolist()]
    return datasets.Dataset.from_list(
        [
            dict(prompt="".join(t[:4]), chosen="".join(t[4:6]), rejected="".join(t[6:]))
            for t in texts
        ]
    )


def test_preference_losses_need_a_reference_of_their_own(tmp_path):
    trl = pytest.importorskip("trl")

    class HybridDPOTrainer(HybridTrainerMixin, trl.DPOTrainer):
        pass

    def make(**options):
        return HybridDPOTrainer(
            base_model(),
            args=trl.DPOConfig(**vars_of(arguments(tmp_path, learning_rate=0.0)), **options),
            train_dataset=preferences(),
            processing_class=word_tokenizer(),
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=2),
            zo=dict(lr=1e-3),
        )

    with pytest.raises(ValueError, match="precompute_ref_log_probs=True"):
        make()
    done = make(precompute_ref_log_probs=True)
    done.train()
    assert all(slope > 0 for slope in logged(done, "projected_grad"))
