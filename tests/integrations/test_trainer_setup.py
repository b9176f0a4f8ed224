"""The optimizer that HybridTrainer makes or is given, and what it refuses."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from tiny_llama import (  # noqa: E402
    DATA,
    arguments,
    base_model,
    lora,
)
from trained_llama import (  # noqa: E402
    PER_EXAMPLE,
    trainer,
)

from zofo_optim import (  # noqa: E402
    HybridZOFO,
    hybrid_param_groups,
)
from zofo_optim.trainer import HybridTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_updates_in_the_backward_are_refused(tmp_path):
    """The Trainer clips between backward and step."""
    hybrid = dict(optimizer_in_backward=True, nonfinite="raise")
    with pytest.raises(ValueError, match="hybrid must not have optimizer_in_backward=True"):
        trainer(tmp_path, hybrid=hybrid).create_optimizer()


def test_pairs_are_refused(tmp_path):
    hybrid = dict(PER_EXAMPLE, estimator="antithetic")
    made = trainer(tmp_path, base_model().requires_grad_(False), hybrid=hybrid)
    with pytest.raises(ValueError, match="hybrid must not have estimator='antithetic'"):
        made.create_optimizer()


def test_groups_are_those_of_the_arguments(tmp_path):
    options = dict(optim="adamw_torch", weight_decay=0.1, adam_beta2=0.9)
    made = trainer(tmp_path, options=options, exclude="norm", hybrid=dict(num_samples=2))
    optimizer = made.create_optimizer()
    assert made.hybrid_optimizer is optimizer
    decaying, zeroth = optimizer.param_groups
    assert (decaying["mode"], decaying["lr"], decaying["weight_decay"]) == ("fo", 0.1, 0.1)
    assert decaying["betas"] == (0.9, 0.9)
    assert (zeroth["mode"], zeroth["lr"], zeroth["weight_decay"]) == ("zo", 1e-3, 0)
    assert not any("norm" in name for name in zeroth["param_names"])
    assert "num_samples=2" in repr(optimizer)
    assert "AdamW" in repr(optimizer)


def test_an_optimizer_of_ones_own(tmp_path):
    model = lora()
    groups = hybrid_param_groups(model, verbose=False)
    optimizer = HybridZOFO(groups, lr=1e-3, distribution="rademacher")
    done = trainer(tmp_path, model, zo=None, optimizers=(optimizer, None))
    done.train()
    assert done.hybrid_optimizer is optimizer
    for bad in (dict(zo=dict(lr=1e-3)), dict(zo=None, hybrid=dict(seed=1))):
        with pytest.raises(ValueError, match="must be left out"):
            trainer(tmp_path, model, optimizers=(optimizer, None), **bad)
    sgd = torch.optim.SGD(optimizer.param_groups[1]["params"])
    with pytest.raises(TypeError, match=r"must hold a HybridZOFO.*got SGD"):
        trainer(tmp_path, model, zo=None, optimizers=(sgd, None))


def test_the_trainer_of_transformers_itself(tmp_path):
    """It passes no closure to the optimizer: the error says what does."""
    model = lora()
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), verbose=False)
    plain = transformers.Trainer(
        model, arguments(tmp_path), train_dataset=DATA, optimizers=(HybridZOFO(groups), None)
    )
    with pytest.raises(RuntimeError, match=r"use zofo_optim\.trainer\.HybridTrainer"):
        plain.train()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(is_deepspeed_enabled=True), "deepspeed must not be used"),
        (dict(is_fsdp_enabled=True), "fsdp must not be used"),
    ],
)
def test_what_is_not_supported(flags, message, tmp_path):
    class Other(HybridTrainer):
        def add_callback(self, callback):
            pass

    made = trainer(tmp_path)
    for name, value in flags.items():
        setattr(made, name, value)
    with pytest.raises(ValueError, match=message):
        made._check_supported()


def test_seeds_reach_the_directions(tmp_path):
    for seed in (1, 2):
        made = trainer(tmp_path, options=dict(seed=seed))
        made.create_optimizer()
        assert {g["seed"] for g in made.hybrid_optimizer.param_groups if g["mode"] == "zo"} == {
            seed
        }
    made = trainer(tmp_path, hybrid=dict(seed=7))
    made.create_optimizer()
    assert {g["seed"] for g in made.hybrid_optimizer.param_groups if g["mode"] == "zo"} == {7}


def test_the_base_needs_a_rate_of_its_own(tmp_path):
    with pytest.raises(ValueError, match="zo must have the learning rate"):
        trainer(tmp_path, zo=dict(mu=1e-3)).create_optimizer()
    with pytest.raises(ValueError, match=r"zo must be left out .*requires_grad_\(False\)"):
        trainer(tmp_path, base_model()).train()  # forgotten to freeze


def test_an_optimizer_class_given_to_the_trainer(tmp_path):
    given = dict(optimizer_cls_and_kwargs=(torch.optim.Adam, dict(lr=7e-3)))
    made = trainer(tmp_path, **given)
    made.create_optimizer()
    assert made.hybrid_optimizer.param_groups[0]["lr"] == 7e-3
    assert "betas" in made.hybrid_optimizer.param_groups[0]
    given = dict(optimizer_cls_and_kwargs=(torch.optim.Adam, dict(params=[])))
    with pytest.raises(ValueError, match=r"which sets \['params'\]"):
        trainer(tmp_path, **given).create_optimizer()


def test_no_optimizer_yet(tmp_path):
    with pytest.raises(RuntimeError, match=r"call create_optimizer\(\) or train\(\)"):
        _ = trainer(tmp_path).hybrid_optimizer


def test_trainers_that_buffer_batches_are_refused(tmp_path):
    class Buffering(HybridTrainer):
        _buffered_inputs = None

    with pytest.raises(TypeError, match="Buffering cannot train by HybridZOFO"):
        trainer(tmp_path, cls=Buffering)
    trl = pytest.importorskip("trl")
    assert "_buffered_inputs" in trl.GRPOTrainer.__init__.__code__.co_names
