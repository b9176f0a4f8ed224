"""HybridTrainer on several processes: as one process on the same global batches."""

import tempfile
import warnings
from pathlib import Path

import pytest
import small_nets
import torch
import torch.distributed as dist
from launch import case, launched, run_cases

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from tiny_llama import TOKENS, arguments  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler  # noqa: E402

from zofo_optim import HybridZOFO, hybrid_param_groups  # noqa: E402
from zofo_optim.trainer import HybridTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LAUNCHER = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
LAUNCHER += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
results = launched(__file__, 2, module=LAUNCHER)  # which is torchrun with what accelerate adds

LABELS = TOKENS.clone()
LABELS[:, 0] = -100
for row, hidden in enumerate([0, 5, 2, 1, 6, 3, 0, 4, 2, 5, 1, 3]):  # so that means are weighted
    LABELS[row, 1 : 1 + hidden] = -100
DATA = [
    dict(input_ids=ids, labels=labels)
    for ids, labels in zip(TOKENS.tolist(), LABELS.tolist(), strict=True)
]
PER_EXAMPLE = dict(structure="low_rank", perturbation="streamed", directions="per_example")
RUNS = {
    "hybrid": dict(),
    "accumulated": dict(args=dict(gradient_accumulation_steps=2, max_grad_norm=0.05)),
    "one_sided": dict(hybrid=dict(estimator="one_sided", num_samples=2)),
    "coupled": dict(hybrid=dict(coupling=0.5, perturbation="streamed")),
    "zeroth_order": dict(frozen=True, args=dict(gradient_accumulation_steps=3)),
    "per_example": dict(frozen=True, hybrid=PER_EXAMPLE, args=dict(gradient_accumulation_steps=2)),
    "hybrid_per_example": dict(
        hybrid=dict(PER_EXAMPLE, estimator="one_sided"), args=dict(label_smoothing_factor=0.1)
    ),
    "adam": dict(args=dict(optim="adamw_torch", learning_rate=1e-3, weight_decay=0.1)),
}


def loss64(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    """transformers' own, which takes float32."""
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def model_of(frozen=False):
    """In float64 throughout."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        word_embed_proj_dim=16,
        dropout=0.0,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    model = transformers.OPTForCausalLM(config).double()
    model.loss_function = loss64
    if frozen:
        return model.requires_grad_(False)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2))


def trainer(folder, size=1, args=None, frozen=False, hybrid=None, cls=HybridTrainer, **more):
    """With four rows a batch of all processes."""
    chosen = dict(per_device_train_batch_size=4 // size, per_device_eval_batch_size=10 // size)
    chosen.update({"max_steps": 3, **(args or {})})
    return cls(
        model_of(frozen),
        arguments(folder, **chosen),
        train_dataset=DATA,
        eval_dataset=DATA[:10],
        zo=dict(lr=1e-2, mu=1e-3),
        exclude="*embed_positions*",
        hybrid=hybrid,
        **more,
    )


def told(done):
    """What training left: weights, and what was logged."""
    return dict(
        weights={name: p.detach().clone() for name, p in done.model.named_parameters()},
        logs=[
            {k: v for k, v in entry.items() if k in ("loss", "projected_grad", "eval_loss")}
            for entry in done.state.log_history
        ],
    )


def folder_of_all():
    found = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return Path(found[0])


def assert_alike(ours, theirs, tolerance=1e-7):
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, p in ours["weights"].items():
        torch.testing.assert_close(p, theirs["weights"][name], rtol=tolerance, atol=tolerance)
    for entry, other in zip(ours["logs"], theirs["logs"], strict=True):
        assert entry == pytest.approx(other, rel=1e-5, abs=1e-5)


def case_of(name):
    def run(rank, size):
        done = trainer(folder_of_all(), size, **RUNS[name])
        done.train()
        wrapped = isinstance(done.model_wrapped, DistributedDataParallel)
        return dict(told(done), wrapped=wrapped, evaluated=done.evaluate()["eval_loss"])

    run.__name__ = name
    case(run)


for name in RUNS:
    case_of(name)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_as_one(results, name, tmp_path):
    options = RUNS[name]
    first, second = results[name]
    assert first["wrapped"] is not options.get("frozen", False)
    for key, p in first["weights"].items():
        assert torch.equal(p, second["weights"][key])
    done = trainer(tmp_path, **options)
    before = {key: p.detach().clone() for key, p in done.model.named_parameters()}
    done.train()
    assert_alike(first, told(done))
    trains = [key for key in before if "embed_positions" not in key and "lora_A" not in key]
    assert all((first["weights"][key] - before[key]).abs().max() > 1e-6 for key in trains)
    assert first["evaluated"] == pytest.approx(done.evaluate()["eval_loss"], rel=1e-6)


@case
def samples(rank, size):
    """Each process evaluates directions of its own, on batches of its own."""
    hybrid = dict(parallel="samples", num_samples=2, perturbation="streamed")
    done = trainer(folder_of_all(), size, hybrid=hybrid)
    done.train()
    return told(done)


def test_samples_in_parallel(results):
    ours, theirs = results["samples"]
    assert_alike(ours, theirs, 0)
    before = dict(model_of().named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in ours["weights"].items())


# ---- checkpoints ------------------------------------------------------------------------------


@case
def checkpoints(rank, size):
    """Saved after two of four steps; gone on with from there by as many processes."""
    folder = folder_of_all()
    args = dict(max_steps=4, save_strategy="steps", save_steps=2)
    done = trainer(folder, size, args=args)
    done.train()
    dist.barrier()  # the first process writes
    again = trainer(folder_of_all(), size, args=args)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return dict(folder=folder, through=told(done), again=told(again))


def test_a_checkpoint_goes_on_with_any_number_of_processes(results, tmp_path):
    reason = "where processes work together, peft 0.19 reads adapters by transformers 5 alone"
    pytest.importorskip("transformers", "5", reason=reason)
    for found in results["checkpoints"]:
        assert_alike(found["through"], found["again"], 0)
    saved = found["folder"] / "checkpoint-2"
    assert {"zo_weights.safetensors", "adapter_model.safetensors", "optimizer.pt"} <= {
        path.name for path in saved.iterdir()
    }
    one = trainer(tmp_path, args=dict(max_steps=4))
    one.train(resume_from_checkpoint=str(saved))
    assert_alike(found["through"], told(one))


# ---- one process fails, or differs -------------------------------------------------------------


class Bad(HybridTrainer):
    """The second process's loss is not finite in the second step."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        bad = self.state.global_step == 1 and self.accelerator.process_index == 1
        return loss * float("nan") if bad else loss


@case
def nonfinite(rank, size):
    found = []
    for frozen in (True, False):
        done = trainer(folder_of_all(), size, frozen=frozen, cls=Bad)
        done.train()
        found.append((told(done), done.hybrid_optimizer.skipped_steps))
    return found


def test_a_loss_that_is_not_finite_in_one_is_skipped_in_all(results):
    for (ours, skipped), (theirs, also) in zip(*results["nonfinite"], strict=True):
        assert skipped == also == 1
        assert_alike(ours, theirs, 0)
        assert all(p.isfinite().all() for p in ours["weights"].values())


# ---- what cannot be done ----------------------------------------------------------------------


def test_data_parallel_is_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"each process must train on one device.*torchrun"):
        HybridTrainer(model_of(), args, train_dataset=DATA, zo=dict(lr=1e-3))


@case
def sharded(rank, size):
    from torch.distributed.fsdp import fully_shard

    class Sharded(HybridTrainer):
        def __init__(self, model, *args, **kwargs):
            super().__init__(fully_shard(model), *args, **kwargs)

    try:
        trainer(folder_of_all(), size, frozen=True, cls=Sharded)
    except ValueError as error:
        return str(error)


def test_a_sharded_model_is_refused(results):
    for said in results["sharded"]:
        assert "model must not be sharded with HybridTrainer" in said


@case
def interleaved(rank, size):
    model = model_of(frozen=True)
    groups = hybrid_param_groups(
        model, dict(lr=1e-2), exclude="*embed_positions*", directions="per_example", verbose=False
    )
    args = arguments(folder_of_all())
    found = []
    for given in (
        dict(optimizers=(HybridZOFO(groups, **PER_EXAMPLE), None)),
        dict(zo=dict(lr=1e-2), hybrid=dict(PER_EXAMPLE, example_order="interleaved")),
    ):
        try:
            HybridTrainer(model, args, train_dataset=DATA, **given).train()
        except ValueError as error:
            found.append(str(error))
    right = HybridZOFO(groups, **PER_EXAMPLE, example_order="contiguous")
    HybridTrainer(model, args, train_dataset=DATA, optimizers=(right, None))
    return found


def test_examples_in_another_order_are_refused(results):
    for found in results["interleaved"]:
        for said in found:
            assert "example_order must be 'contiguous' where several processes train" in said
        assert len(found) == 2


# ---- others' loops ------------------------------------------------------------------------------


@case
def loop_of_accelerate(rank, size):
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = small_nets.network()
    rows = torch.cat([small_nets.batch(step) for step in range(3)])
    loader = DataLoader(rows, batch_size=small_nets.ROWS // size)
    call, optimizer, loader = accelerator.prepare(model, small_nets.optimizer_of(model), loader)
    for x in loader:
        optimizer.zero_grad()
        optimizer.step(small_nets.closure_of(call, x))
    return isinstance(call, DistributedDataParallel), small_nets.parameters(model)


@case
def loop_of_lightning(rank, size):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = small_nets.network()

        def training_step(self, x, number):
            return self.net(x).square().mean()

        def configure_optimizers(self):
            return small_nets.optimizer_of(self.net)

    module = Module()
    rows = torch.cat([small_nets.batch(step) for step in range(3)])
    sampler = DistributedSampler(rows, shuffle=False)  # Lightning's own shuffles
    quiet = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    fitting = lightning.Trainer(
        accelerator="cpu",
        devices=size,
        strategy="ddp",
        max_epochs=1,
        use_distributed_sampler=False,
        **quiet,
    )
    fitting.fit(module, DataLoader(rows, small_nets.ROWS // size, sampler=sampler))
    return fitting.world_size == size, small_nets.parameters(module)


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_loops_of_others(results, name):
    pytest.importorskip(name)
    model = small_nets.network()
    once = small_nets.train(model, model, slice(None), steps=3)
    for several, found in results[f"loop_of_{name}"]:
        assert several
        assert small_nets.apart(found, once) < 1e-10


@case
def partitions(rank, size):
    """Profiled in each process, on batches of its own."""
    given = dict(budget=0.97, batches=1)
    done = trainer(folder_of_all(), size, partition=given)
    done.train()
    every = None
    try:
        trainer(folder_of_all(), size, partition=dict(given, every=1))
    except ValueError as error:
        every = str(error)
    return done.partition, told(done), every


def test_processes_have_one_partition(results):
    (ours, left, said), (theirs, also, _) = results["partitions"]
    assert ours == theirs
    assert_alike(left, also, 0)
    assert "partition must not have every= where several processes" in said


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    run_cases()
