"""transformers' Trainer with HybridZOFO; its training step is the closure.

Needs transformers, so it is not imported by ``zofo_optim`` itself::

    from zofo_optim.trainer import HybridTrainer
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from .buffers import ParamGroups
from .counts import Counts
from .groups import hybrid_param_groups
from .losses import OF_ELEMENTS, example_losses_of, task_of
from .optimizer import HybridZOFO
from .partition import Partition
from .partition.trainer import NO_RATE, Again, TrainerPartition
from .quantized.checkpoints import check_side_options
from .sharding import is_sharded
from .smoothness.trainer import SmoothnessCallback
from .trainer_saving import SavingMixin


class _Clearing(TrainerCallback):
    """Clears coefficients of steps that never came, where the Trainer clears their gradients.

    A step may be skipped by a GradScaler, or cut off by an error, an interruption or a checkpoint
    before its end.
    """

    def __init__(self, trainer: HybridTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.hybrid_optimizer.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.hybrid_optimizer.zero_grad()


class HybridTrainerMixin(SavingMixin):
    """Makes a Trainer, or a subclass such as TRL's SFTTrainer, train by HybridZOFO.

    Put it first: ``class HybridSFTTrainer(HybridTrainerMixin, SFTTrainer): pass``. Everything is
    the Trainer's own: its training step becomes the closure of ``HybridZOFO.backward``, so that
    accumulation, clipping, mixed precision, schedulers, callbacks and logging work as usual.
    What a trainer counts in its attributes, such as TRL's metrics, is of a step's first evaluation.
    With ``hybrid=dict(directions="per_example", ...)`` the loss is the mean of
    :meth:`example_losses`. A subclass with a loss of its own overrides that, and it is trained
    whatever the directions are.

    Started by ``torchrun`` or ``accelerate launch``, its processes train one model: with an adapter
    within DDP, without one in no wrapper. Steps are those of one process on the batches of all;
    losses are averaged as the Trainer does, by tokens where it counts them. The first process
    saves, and a checkpoint goes on with any number of processes.

    The learning rate, the weight decay and the optimizer (``adamw_torch``, ``sgd``, ...) of the
    first-order group are those of the arguments; schedulers drive both groups. Logs get
    ``projected_grad``, the mean size of the last step's projected gradients (of its whole batch,
    under accumulation), and ``skipped_steps``.
    Where peft saves the adapter alone, ``zo_weights.safetensors`` beside it holds the trained
    weights of the base model, for resuming, ``load_best_model_at_end`` and
    :func:`load_base_weights`. Of a model without an adapter whose weights torchao's ``quantize_``
    or quanto has made, which transformers cannot write, checkpoints hold that file and
    ``fo_weights.safetensors`` alone: resume with the model quantised as it was.

    Args:
        *args: as for the Trainer.
        zo: options of the zeroth-order group, ``lr`` among them; see
            :func:`hybrid_param_groups`.
        include, exclude: which frozen parameters train, likewise.
        quantized: what becomes of quantised weights, likewise; not with a partition. "low_rank"
            adds side updates of rank 16; for others call :func:`add_side_updates` before.
        hybrid: options of :class:`HybridZOFO`, such as ``dict(estimator="one_sided")``. Its seed
            is that of the arguments unless given.
        partition: which tensors train first-order: a :class:`~zofo_optim.partition.Partition`, or
            options of :func:`~zofo_optim.partition.importance_partition` (``budget``, ``of``,
            ``policy``, ``seed``), by which one is made when the optimizer is. Then ``batches``
            (4) of the first training batches are profiled, which training sees again, and with
            ``every`` the partition is made anew after so many epochs, which excludes a journal.
            Checkpoints hold it.
        **kwargs: as for the Trainer. An optimizer given as ``optimizers=(HybridZOFO(...), None)``
            is taken as it is, without ``zo``, ``include``, ``exclude``, ``quantized``, ``hybrid``
            and ``partition``.

    Raises:
        TypeError: ``optimizers`` holds another optimizer; ``rank`` is given with
            quantized="low_rank"; or the trainer takes another batch in
            each evaluation of a step (GRPO).
        ValueError: both an optimizer and its options were given; the training is distributed in a
            way that is not supported; or the reference of a preference loss (DPO) is the model
            itself; or directions are per example, and ``compute_loss_func`` or a method
            ``compute_loss`` makes a loss of its own, and :meth:`example_losses` is not overridden.
            When the optimizer is made: ``zo`` has no
            ``lr`` (with a partition at once), the batches of ``train_dataset`` come only once and
            are to be profiled, or the arguments name an optimizer that chooses its own parameters,
            other than in groups of all that trains.
    """

    def __init__(
        self,
        *args: Any,
        zo: Mapping[str, Any] | None = None,
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        quantized: str | None = None,
        hybrid: Mapping[str, Any] | None = None,
        partition: Partition | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._slopes: torch.Tensor | None = None  # of all micro-batches of a step
        self._parts = 1  # of a step, whose examples have slopes of their own
        self._losses: torch.Tensor | None = None  # of the examples, in the evaluation going on
        self._training = False
        self._hybrid_options = dict(hybrid or {})
        self._group_options: dict[str, Any] = dict(zo=zo, include=include, exclude=exclude)
        if quantized is not None:
            if partition is not None:
                raise ValueError(
                    f"quantized must be left out where partition is given, got {quantized!r}"
                )
            self._group_options["quantized"] = quantized
            check_side_options(quantized, kwargs)
        self._partition = None if partition is None else TrainerPartition(partition)
        super().__init__(*args, **kwargs)
        self._check_supported()
        if self.optimizer is not None:
            _check_optimizer(self.optimizer)
            if any(self._group_options.values()) or hybrid or self._partition is not None:
                raise ValueError(
                    "zo, include, exclude, quantized, hybrid and partition must be left out where "
                    "optimizers holds a HybridZOFO, which has its options already"
                )
            self._check_options(vars(self.hybrid_optimizer.settings))
            if self.hybrid_optimizer.settings.directions == "per_example":
                self._check_own_loss()
        elif self._partition is not None:
            self._partition.check(zo)
        self.add_callback(_Clearing(self))
        if self._partition is not None and self._partition.every is not None:
            self.add_callback(Again(self, self._partition))

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's, whose accelerator does not wrap a model that takes no gradients in DDP."""
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def prepare_model(
            model: nn.Module,
            device_placement: bool | None = None,
            evaluation_mode: bool = False,
        ) -> nn.Module:
            frozen = not any(p.requires_grad for p in model.parameters())
            found: nn.Module = prepare(model, device_placement, evaluation_mode or frozen)
            return found

        self.accelerator.prepare_model = prepare_model

    def _check_supported(self) -> None:
        if self.is_deepspeed_enabled:
            raise ValueError(
                "deepspeed must not be used with HybridZOFO, as its engine steps an optimizer of "
                "its own; a zeroth-order base model needs no ZeRO: train without deepspeed"
            )
        if self.is_fsdp_enabled:
            raise ValueError(
                "fsdp must not be used with HybridTrainer, as accelerate replaces the parameters "
                "of an optimizer that knows them, got fsdp in args; shard the model by "
                "torch.distributed.fsdp.fully_shard, make a HybridZOFO of it, and train in a loop "
                "of your own. Zeroth order needs no sharded gradients or optimizer state: where "
                "the weights fit, train without"
            )
        if any(map(is_sharded, self._module().parameters())):
            raise ValueError(
                "model must not be sharded with HybridTrainer, which saves weights as they are, "
                "got DTensors; train in a loop of your own"
            )
        if self.args.parallel_mode.value not in ("not_parallel", "distributed"):
            raise ValueError(
                "each process must train on one device with HybridZOFO, got "
                f"args.parallel_mode={self.args.parallel_mode.value!r}: start one process a "
                "device by torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES"
            )
        config = getattr(self.accelerator, "parallelism_config", None)
        sizes = {name: getattr(config, f"{name}_size", 1) for name in ("tp", "cp", "sp")}
        if any(size > 1 for size in sizes.values()):
            raise ValueError(
                "parallelism_config must be data parallel with HybridTrainer, as its processes "
                f"have batches of their own, got {sizes}; train in a loop of your own"
            )
        if self._processes > 1 and self._partition is not None and self._partition.every:
            raise ValueError(
                "partition must not have every= where several processes train, as DDP averages "
                "gradients of the tensors that had them at its start, got "
                f"every={self._partition.every} and {self._processes} processes"
            )
        if hasattr(self, "_buffered_inputs"):
            raise TypeError(
                f"{type(self).__name__} cannot train by HybridZOFO: its training step takes "
                "another part of a generated batch each time, and zeroth order evaluates one "
                "step's loss several times"
            )
        precomputed = getattr(self.args, "precompute_ref_log_probs", True)
        if getattr(self, "ref_model", self) is None and not precomputed:
            raise ValueError(
                "the reference model must not be the model that is trained, whose base weights "
                "zeroth order moves: set precompute_ref_log_probs=True in args, or pass ref_model"
            )

    @property
    def _processes(self) -> int:
        """That train together."""
        return int(self.accelerator.num_processes)

    @property
    def hybrid_optimizer(self) -> HybridZOFO:
        """The HybridZOFO, without accelerate's wrapper; for a journal, or its state."""
        if self.optimizer is None:
            raise RuntimeError("there is no optimizer yet: call create_optimizer() or train()")
        found = getattr(self.optimizer, "optimizer", self.optimizer)
        _check_optimizer(found)
        assert isinstance(found, HybridZOFO)
        return found

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """HybridZOFO for the model; see the class."""
        if self.optimizer is None:
            model: Any = args[0] if args else kwargs.get("model") or self.model
            chosen = getattr(self, "optimizer_cls_and_kwargs", None)
            cls, options = chosen or self.get_optimizer_cls_and_kwargs(self.args, model)
            theirs = _own_groups(options)
            if theirs is not None:
                options = {k: v for k, v in options.items() if k != "optimizer_dict"}
            parameters = {"params", "model", "optimizer_dict"} & set(options)
            if theirs is not None and self._partition is not None:
                raise ValueError(
                    f"partition must be left out with {type(self).__name__}, which makes groups of "
                    "its own for what trains"
                )
            if parameters:
                raise ValueError(
                    f"optim must leave the choice of parameters to HybridZOFO, got "
                    f"{self.args.optim!r} of {type(self).__name__}, which sets "
                    f"{sorted(parameters)}: pass optimizers=(HybridZOFO(...), None)"
                )
            decaying = set(self.get_decay_parameter_names(model))
            self._check_options(self._hybrid_options)
            directions = self._hybrid_options.get("directions", "shared")
            if directions == "per_example":
                self._check_own_loss()
            given = {"fo_optimizer": cls, "seed": self.args.seed, **options}
            given["example_order"] = "contiguous"  # as accelerate deals batches
            given.update(self._hybrid_options)
            verbose, empty = self.is_world_process_zero(), False
            if self._partition is None:
                groups = hybrid_param_groups(
                    model, **self._group_options, directions=directions, verbose=verbose
                )
            else:
                empty = self._partition.every is not None
                groups = self._partition.groups(
                    self, model, self._group_options, given, decaying, verbose=verbose
                )
            scales = groups.scales if isinstance(groups, ParamGroups) else ()
            first_order = [
                part
                for group in groups
                if group["mode"] == "fo"
                for part in _by_decay(group, decaying, self.args.weight_decay, empty=empty)
            ]
            if theirs is not None:
                first_order = _named(theirs, model)
            # first, as the Trainer logs the first group's learning rate
            zeroth_order = [group for group in groups if group["mode"] == "zo"]
            if self._processes > 1:  # DDP waits for gradients of all that require them
                for p in (p for group in zeroth_order for p in group["params"]):
                    p.requires_grad_(False)
            groups = ParamGroups([*first_order, *zeroth_order], model, scales)
            if len(groups) > len(first_order) and "lr" not in (self._group_options["zo"] or {}):
                raise ValueError(NO_RATE)
            with self._naming_arguments():
                self.optimizer = HybridZOFO(groups, **given)
            if not first_order:  # it has no gradients to scale
                self.accelerator.scaler = None
        return self.optimizer

    @contextmanager
    def _naming_arguments(self) -> Generator[None, None, None]:
        """Errors of HybridZOFO's options say in which argument of ours they were given."""
        try:
            yield
        except (TypeError, ValueError, RuntimeError) as error:
            named = set(re.findall(r"\w+", str(error)))
            ours = {"hybrid": self._hybrid_options, "zo": self._group_options["zo"] or {}}
            found = [
                f"{argument}=dict({option}={value!r})"
                for argument, options in ours.items()
                for option, value in options.items()
                if option in named
            ]
            if not found:
                raise
            advice = ""
            if "HybridZOFO" in named:
                advice = "; give options of HybridZOFO as hybrid=dict(...)"
            raise type(error)(f"{error} (from {' and '.join(found)}{advice})") from error

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's own step, evaluated where HybridZOFO needs the loss."""
        step = super().training_step
        items = kwargs.get("num_items_in_batch", args[0] if args else None)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SmoothnessCallback):
                callback.on_batch(self, model, inputs, items)
        counts: Counts | None = None  # as the first evaluation leaves them

        def closure() -> torch.Tensor:
            nonlocal counts
            loss = step(model, inputs, *args, **kwargs)
            counts = counts or Counts(self)
            return loss

        def of_examples() -> torch.Tensor:
            loss = closure()
            losses = self._losses
            if losses is None:
                raise RuntimeError(
                    "compute_loss of HybridTrainerMixin must be called in a training step where "
                    "directions='per_example', and was not"
                )
            # the Trainer divides the mean where it accumulates; a bad row tells not by how much
            mean, divisor = losses.mean(), loss.new_full((), self._divisor())
            told = mean.isfinite() & (mean != 0)
            return losses * torch.where(told, loss / mean, 1 / divisor)

        optimizer = self.hybrid_optimizer
        accumulates = optimizer.accumulated is not None
        per_example = optimizer.settings.directions == "per_example"
        self._training = per_example or self._has_own_losses()
        try:
            loss = optimizer.backward(of_examples if per_example else closure)
        finally:
            if counts is not None:
                counts.restore()
            self._training, self._losses = False, None
        self._keep_slopes(accumulates)
        assert isinstance(loss, torch.Tensor)
        return loss.mean()

    def _keep_slopes(self, accumulates: bool) -> None:
        """Of the estimate just taken, beside those before it in the step, for the log."""
        slopes = self.hybrid_optimizer.projected_grads
        per_example = self.hybrid_optimizer.settings.directions == "per_example"
        before = self._slopes if accumulates else None
        if before is not None and slopes is not None:
            slopes = torch.cat([before, slopes], dim=1) if per_example else before + slopes
        self._slopes = slopes
        self._parts = self._parts + 1 if before is not None and per_example else 1

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; in training steps the mean of :meth:`example_losses`, where it counts."""
        if not self._training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        if items is not None and self._processes > 1 and self.args.average_tokens_across_devices:
            items = torch.as_tensor(items) / self._processes  # the mean over processes is trained
        losses = self.example_losses(model, inputs, items)
        self._losses = losses.detach()
        return losses.mean()

    def example_losses(self, model: Any, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        """The losses of a batch's examples, (B,), whose mean is trained; to be overridden.

        Args:
            model: as it is called, perhaps wrapped.
            inputs: of the model, labels among them.
            num_items_in_batch: labels in all batches that are accumulated, where the Trainer
                counts them; of several processes, their mean.

        Returns:
            :func:`example_losses_of` the model, by the arguments' ``label_smoothing_factor``.
        """
        counted = self.model_accepts_loss_kwargs and isinstance(inputs.get("labels"), torch.Tensor)
        if counted and task_of(model, inputs["labels"]) in OF_ELEMENTS:  # which have no such count
            counted = False
        return example_losses_of(
            model,
            inputs,
            num_items_in_batch=num_items_in_batch if counted else None,
            label_smoothing=self.args.label_smoothing_factor,
        )

    @property
    def partition(self) -> Partition | None:
        """By which the optimizer's groups were made; None without one, or before they are."""
        return None if self._partition is None else self._partition.partition

    def _divisor(self) -> int:
        """By what the Trainer divides a micro-batch's loss: models that count labels do it."""
        return 1 if self.model_accepts_loss_kwargs else self._micro_batches()

    def _sums_micro_batches(self, items: Any) -> bool:
        """Whether the Trainer adds up losses of micro-batches undivided."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        counted = self.model_accepts_loss_kwargs and items is not None
        return bool(counted or self.compute_loss_func is not None) if said is None else bool(said)

    def _micro_batches(self) -> int:
        """Of the present step; an epoch's last one may have fewer."""
        steps = self.args.gradient_accumulation_steps
        return int(getattr(self, "current_gradient_accumulation_steps", steps))

    def _has_own_losses(self) -> bool:
        return type(self).example_losses is not HybridTrainerMixin.example_losses

    def _check_options(self, options: Mapping[str, Any]) -> None:
        if options.get("optimizer_in_backward"):
            raise ValueError(
                "hybrid must not have optimizer_in_backward=True, as the Trainer calls backward "
                "and step apart, and clips between; call optimizer.step(closure) in a loop of your "
                "own"
            )
        self._check_estimator(options.get("estimator", "two_sided"))
        order = options.get("example_order", "contiguous")
        each = options.get("directions") == "per_example"
        if each and order != "contiguous" and self._processes > 1:
            raise ValueError(
                "example_order must be 'contiguous' where several processes train, as accelerate "
                f"deals a batch's examples to them, got {order!r}: give it to HybridZOFO, or leave "
                "it out of hybrid"
            )

    def _check_estimator(self, estimator: str) -> None:
        if estimator == "antithetic":
            raise ValueError(
                "hybrid must not have estimator='antithetic', whose batches are of pairs of the "
                "same examples, which the Trainer does not make; use 'one_sided' or 'two_sided'"
            )

    def _check_own_loss(self) -> None:
        """Losses of examples are known where the loss is the model's own, or overridden."""
        if self._has_own_losses():
            return
        made_by = [
            cls.__name__
            for cls in type(self).__mro__
            if "compute_loss" in vars(cls) and cls not in (HybridTrainerMixin, Trainer)
        ]
        if self.compute_loss_func is not None or made_by:
            what = "compute_loss_func" if not made_by else f"{made_by[0]}.compute_loss"
            raise ValueError(
                f"directions must be 'shared' with {what}, which makes a loss that is not known "
                "to be a mean over examples; or override example_losses, or train in a loop of "
                "your own, with a closure that returns losses of shape (B,)"
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with what zeroth order has to tell."""
        if "loss" in logs and self._slopes is not None:
            logs["projected_grad"] = self._parts * self._slopes.abs().mean().item()
            logs["skipped_steps"] = self.hybrid_optimizer.skipped_steps
        super().log(logs, *args, **kwargs)


def _own_groups(options: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The groups that a trainer makes for its first-order optimizer.

    So do those of sentence-transformers, as their losses have weights too.
    """
    groups = options.get("optimizer_dict")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return None
    return groups


def _named(groups: Sequence[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Those with parameters, which get names; the loss's have none in the model."""
    known = {id(p): name for name, p in model.named_parameters()}
    further = (f"loss.{i}" for i in itertools.count())
    return [
        {
            **group,
            "mode": "fo",
            "param_names": [known.get(id(p)) or next(further) for p in group["params"]],
        }
        for group in groups
        if group["params"]
    ]


def _by_decay(
    group: dict[str, Any], decaying: set[str], weight_decay: float, empty: bool = False
) -> list[dict[str, Any]]:
    """As the Trainer does: no decay for biases and norms; both parts where one may be empty."""
    parts = []
    for names, decay in ((True, weight_decay), (False, 0.0)):
        chosen = [
            (name, p)
            for name, p in zip(group["param_names"], group["params"], strict=True)
            if (name in decaying) is names
        ]
        if chosen or empty:
            part = {
                "params": [p for _, p in chosen],
                "param_names": [name for name, _ in chosen],
                "weight_decay": decay,
            }
            parts.append({**group, **part})
    return parts


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, HybridZOFO):
        raise TypeError(
            f"optimizers must hold a HybridZOFO, or None to have one made, got "
            f"{type(optimizer).__name__}"
        )


class HybridTrainer(HybridTrainerMixin, Trainer):
    """``transformers.Trainer`` that trains by HybridZOFO; see :class:`HybridTrainerMixin`.

    Example:
        >>> trainer = HybridTrainer(
        ...     get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")),
        ...     TrainingArguments("out", learning_rate=1e-3, optim="sgd"),
        ...     train_dataset=dataset,
        ...     zo=dict(lr=1e-6, mu=1e-3),
        ... )
        >>> trainer.train()
    """
