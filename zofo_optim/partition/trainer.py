"""Partitions in transformers' Trainer: profiled on its batches, saved with its checkpoints."""

from __future__ import annotations

import inspect
import itertools
import os
import warnings
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from ..buffers import ParamGroups
from ..checks import caller_level, check_seed
from ..counts import Counts
from ..evaluation import Closure, GlobalRandomState
from ..journal import Journal
from ..optimizer import HybridZOFO
from ..plain import plain
from .budgets import parse_budget
from .making import make_partition
from .partition import Partition
from .policies import POLICIES
from .trial_step import SHARED

if TYPE_CHECKING:
    from ..trainer import HybridTrainerMixin

FILE = "partition.json"
"""In a checkpoint."""
NO_RATE = "zo must have the learning rate of the base model, as lr=..."
BATCHES = 4
_OPTIONS = ("budget", "of", "policy", "seed", "batches", "every")
_OF_HYBRID = ("fo_optimizer", "coupling", "directions")
"""Arguments of HybridZOFO that a partition is made with too."""
_HYBRID = frozenset(inspect.signature(HybridZOFO).parameters)


class TrainerPartition:
    """What a trainer's argument ``partition`` says; see :class:`HybridTrainerMixin`.

    Args:
        given: a :class:`Partition`, or options of :func:`importance_partition`, with ``batches``
            and ``every``.

    Raises:
        TypeError: it is neither.
        ValueError: an option that there is not, or without such a value.
    """

    def __init__(self, given: Partition | Mapping[str, Any]) -> None:
        self.partition: Partition | None = given if isinstance(given, Partition) else None
        """The one that the groups are made by, once they are."""
        if not isinstance(given, Partition | Mapping):
            raise TypeError(
                "partition must be a Partition, or a mapping of options of importance_partition, "
                f"got {type(given).__name__}"
            )
        self._given = self.partition is not None
        self._loaded = False  # for the next optimizer
        self._options = {} if isinstance(given, Partition) else dict(given)
        for name in self._options:
            if name not in _OPTIONS:
                raise ValueError(f"partition must have options of {_OPTIONS}, got {name!r}")
        parse_budget(self._options.get("budget", 0.6), self._options.get("of", "flops"))
        check_seed(self._options.get("seed", 0))
        if (policy := self._options.get("policy", "importance")) not in POLICIES:
            raise ValueError(
                f"policy in partition must be one of {tuple(POLICIES)}, got {policy!r}"
            )
        self._batches = _count("batches", self._options.pop("batches", BATCHES))
        every = self._options.pop("every", None)
        self.every = None if every is None else _count("every", every)
        """Epochs after which the partition is made anew; None: never."""
        self._arguments: dict[str, Any] = {}
        self._decaying: Collection[str] = ()

    def check(self, zo: Mapping[str, Any] | None) -> None:
        """Before anything is profiled.

        Raises:
            ValueError: ``zo`` has no learning rate, and tensors will be zeroth-order.
        """
        whole = parse_budget(self._options.get("budget", 0.6), self._options.get("of", "flops"))
        leaves: Any = whole.share is not None and whole.share < 1
        if self.partition is not None:
            leaves = self.partition.zeroth_order
        if leaves and "lr" not in (zo or {}):
            raise ValueError(NO_RATE)

    def groups(
        self,
        trainer: HybridTrainerMixin,
        model: nn.Module,
        group_options: Mapping[str, Any],
        hybrid: Mapping[str, Any],
        decaying: Collection[str],
        *,
        verbose: bool,
    ) -> ParamGroups:
        """As of ``hybrid_param_groups``, made by the partition, which is made where there is none.

        Args:
            trainer: whose data and loss they are.
            model: what it trains.
            group_options: ``zo``, ``include`` and ``exclude``.
            hybrid: the arguments of the HybridZOFO to come.
            decaying: names of the parameters with weight decay.
            verbose: print summaries.
        """
        zo = group_options["zo"]
        self._decaying = decaying
        self._arguments = {
            **{name: group_options[name] for name in ("include", "exclude")},
            **{name: hybrid[name] for name in _OF_HYBRID if name in hybrid},
            "fo": {k: v for k, v in hybrid.items() if k in SHARED or k not in _HYBRID},
            "verbose": verbose,
        }
        if not (self._given or self._loaded):
            self.partition = None  # an earlier optimizer's, perhaps of another model
            self.partition = self._made(trainer, model)
        assert self.partition is not None
        self._loaded = False
        groups = self.partition.groups(model, zo, verbose=verbose)
        if zo and self.every is None and not any(group["mode"] == "zo" for group in groups):
            raise ValueError(
                f"zo must be left out where no tensor is zeroth-order, got {dict(zo)}: the budget "
                f"{self.partition.budget!r} lets all train first-order; take a smaller one"
            )
        if self.every is not None:  # later partitions may fill what is empty now
            for mode, options in (("zo", zo or {}), ("fo", {})):
                if not any(group["mode"] == mode for group in groups):
                    groups.append({"params": [], "param_names": [], "mode": mode, **options})
        return groups

    def place(self, groups: list[dict[str, Any]]) -> Callable[[str, Tensor, str], int]:
        """Says in which group of the trainer's optimizer a tensor belongs."""

        def found(name: str, p: Tensor, mode: str) -> int:
            of_mode = [k for k, group in enumerate(groups) if group["mode"] == mode]
            return of_mode[0 if mode == "zo" or name in self._decaying else -1]

        return found

    def _made(self, trainer: HybridTrainerMixin, model: nn.Module) -> Partition:
        with _first_batches(trainer, self._batches) as batches, _as_in_training(model):
            # costs are those of the first one: of padded batches take the largest
            batches.sort(key=_elements, reverse=True)
            closures = [batch_closure(trainer, model, batch) for batch in batches]
            rows = () if self.partition is None else self.partition.rows
            known = [row.name for row in rows if row.candidate] or None
            made = make_partition(
                model, closures, candidates=known, **self._arguments, **self._options
            )
            of_all = [made]  # each process has batches of its own
            broadcast_object_list(of_all)
            return of_all[0]

    def make_again(self, trainer: HybridTrainerMixin) -> None:
        """Profile the model as it is now, and move its tensors between the optimizer's groups."""
        model: Any = trainer.model
        optimizer = trainer.hybrid_optimizer
        self.partition = self._made(trainer, model)
        self.partition.apply(optimizer, model, place=self.place(optimizer.param_groups))

    def save(self, folder: str) -> None:
        if self.partition is not None:
            self.partition.save(os.path.join(folder, FILE))

    def load(self, trainer: HybridTrainerMixin, folder: str) -> None:
        """Go on with a checkpoint's partition, if it has one."""
        path = os.path.join(folder, FILE)
        if os.path.isfile(path):
            loaded = Partition.load(path)
            self._warn_of_another(loaded)
            self.partition = loaded
            self._loaded = trainer.optimizer is None
            if trainer.optimizer is not None:
                optimizer, model = trainer.hybrid_optimizer, trainer.model
                place = self.place(optimizer.param_groups)
                self.partition.apply(optimizer, model, place=place)  # type: ignore[arg-type]

    def _warn_of_another(self, loaded: Partition) -> None:
        """A checkpoint's partition is gone on with, whatever was asked for this time."""
        asked = {k: v for k, v in self._options.items() if k in ("budget", "of", "policy")}
        others = [
            f"{name}={getattr(loaded, name)!r}, not {value!r}"
            for name, value in asked.items()
            if getattr(loaded, name) != plain(value)
        ]
        if self._given and self.partition is not None and self.partition != loaded:
            others = ["another Partition than the one given"]
        if others:
            warnings.warn(
                f"the checkpoint's partition is gone on with, which has {' and '.join(others)}; "
                "begin a training without resuming to have another one",
                stacklevel=caller_level(),
            )


class Again(TrainerCallback):
    """Makes the partition anew every so many epochs, but after the last one."""

    def __init__(self, trainer: HybridTrainerMixin, partition: TrainerPartition) -> None:
        self._trainer = trainer
        self._partition = partition

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what the first change would break off, before anything is trained."""
        listeners = self._trainer.hybrid_optimizer.listeners
        journals = [known for known in listeners if isinstance(known, Journal)]
        if journals:
            raise ValueError(
                "partition must not have every= with a journal, whose tensors stay in their "
                f"groups, got every={self._partition.every} and {journals[0].path}; leave out one "
                "of them"
            )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = round(state.epoch or 0)
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if self._partition.every and done % self._partition.every == 0 and not ends:
            self._partition.make_again(self._trainer)


def _elements(batch: Mapping[str, Any]) -> int:
    return sum(value.numel() for value in batch.values() if isinstance(value, Tensor))


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} in partition must be an int >= 1, got {value!r}")
    return value


@contextmanager
def _first_batches(
    trainer: HybridTrainerMixin, count: int
) -> Generator[list[dict[str, Any]], None, None]:
    """The batches that training would begin with now.

    Generators, accelerate's loaders and what the trainer counts are afterwards as before, so that
    training is as it would have been.
    """
    random = GlobalRandomState({p.device for p in trainer.model.parameters()})  # type: ignore[union-attr]
    counts = Counts(trainer)
    loaders = trainer.accelerator._dataloaders
    kept = list(loaders)
    dataset: Any = trainer.train_dataset
    if isinstance(dataset, IterableDataset) and iter(dataset) is iter(dataset):
        raise ValueError(
            "train_dataset must begin anew with each iter() for its first batches to be profiled, "
            f"got {type(dataset).__name__}, whose iterator is one and the same; make the partition "
            "before, and pass it as partition=partition"
        )
    try:
        loader = trainer.get_train_dataloader()
        iterator = iter(loader)
        try:
            found = [dict(batch) for batch in itertools.islice(iterator, count)]
        finally:
            if hasattr(iterator, "close"):
                iterator.close()
            references = trainer.accelerator.gradient_state.dataloader_references
            if any(known is not None and known is loader for known in references):
                loader.end()  # type: ignore[attr-defined]
        if not found:
            raise ValueError("train_dataset must have a batch to profile, got none")
        yield found
    finally:
        loaders[:] = kept
        counts.restore()
        random.restore()


@contextmanager
def _as_in_training(model: nn.Module) -> Generator[None, None, None]:
    """In training mode, but without gradient checkpointing, through which nothing is counted."""
    before = [(module, module.training) for module in model.modules()]
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        model.train()
        yield
    finally:
        for module, training in before:
            module.training = training
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def batch_closure(
    trainer: HybridTrainerMixin,
    model: nn.Module,
    batch: Mapping[str, Any],
    items: Any = None,
    batches: int = 1,
    *,
    of_examples: bool = False,
) -> Closure:
    """The loss that training has for this batch, without its backward.

    Args:
        trainer: whose loss it is.
        model: as it is called.
        batch: before the trainer has prepared it.
        items: labels in all micro-batches of the step, where the Trainer counts them.
        batches: micro-batches of the step; the sum of their closures is the loss that is trained.
        of_examples: return losses of examples, shape (B,), whose mean is this batch's.
    """

    def closure() -> torch.Tensor:
        inputs = trainer._prepare_inputs(dict(batch))
        trainer._training = of_examples or trainer._has_own_losses()
        try:
            with trainer.accelerator.autocast(), trainer.compute_loss_context_manager():
                loss: torch.Tensor = trainer.compute_loss(
                    model, inputs, **({} if items is None else {"num_items_in_batch": items})
                )
            losses = trainer._losses
        finally:
            trainer._training, trainer._losses = False, None
        loss = loss.mean()
        divides = batches > 1 and not trainer._sums_micro_batches(items)
        if divides:
            loss = loss / batches
        if not of_examples:
            return loss
        assert losses is not None
        losses = losses / batches if divides else losses
        return losses + (loss - loss.detach())  # values of each, the gradient of their mean

    return closure
