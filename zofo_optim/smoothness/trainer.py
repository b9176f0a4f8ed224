"""Smoothness along a training of transformers' Trainer.

Needs transformers, so it is not imported by ``zofo_optim.smoothness`` itself::

    from zofo_optim.smoothness.trainer import SmoothnessCallback
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..counts import Counts
from ..optimizer import HybridZOFO
from ..partition.trainer import batch_closure
from .recorder import SmoothnessRecorder

if TYPE_CHECKING:
    from ..trainer import HybridTrainerMixin

_LOGGED = ("gradient_norm", "smoothness", "trace", "stable_lr")


class SmoothnessCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Measures smoothness along a training of :class:`~zofo_optim.trainer.HybridTrainer`.

    Measures the loss of a step, with all micro-batches that accumulate, at the weights before it.
    The training is not changed, to the bit. Logs by ``trainer.log``, so that
    TensorBoard, W&B and the others see it: ``smoothness_zo``, ``smoothness_fo``, and likewise
    ``gradient_norm``, ``trace`` and ``stable_lr`` of both modes, as far as they are known. The rows
    are saved with checkpoints, in ``trainer_state.json``, and a training that resumes goes on with
    them.

    Args:
        every: steps from one measurement to the next; steps 0, ``every``, ... are measured.
        **options: of :class:`SmoothnessRecorder`: ``directions``, ``products``, ``method``,
            ``margin``, ``patience`` and ``seed``.

    Attributes:
        recorder: the :class:`SmoothnessRecorder`, once training has begun: its ``rows``, ``save``
            and ``plot``. With ``restore_callback_states_from_checkpoint=True`` transformers puts a
            new callback in this one's place, in ``trainer.callback_handler.callbacks``, which has
            it then.

    Raises:
        TypeError: when training begins, the trainer is no HybridTrainer.
        ValueError: when training begins, several processes train; or an option is out of range.

    Example:
        >>> from zofo_optim.smoothness.trainer import SmoothnessCallback
        >>> from zofo_optim.trainer import HybridTrainer
        >>> trainer = HybridTrainer(
        ...     model,
        ...     TrainingArguments("out", learning_rate=1e-3, optim="sgd", report_to=[]),
        ...     train_dataset=dataset,
        ...     zo=dict(lr=1e-6, mu=1e-3),
        ...     callbacks=[SmoothnessCallback(every=50)],
        ... )
        >>> trainer.train()
    """

    def __init__(self, every: int = 50, **options: Any) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be an int >= 1, got {every!r}")
        self._every, self._options = every, options
        self.recorder: SmoothnessRecorder | None = None
        self._batches: list[tuple[dict[str, Any], Any]] = []  # of the present step
        self._due = False

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        rows = self._saved if self.recorder is None else self.recorder.state_dict()
        return {"args": {"every": self._every, **self._options}, "attributes": {"_saved": rows}}

    _saved: dict[str, Any] | None = None  # where transformers restores callbacks from it

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(optimizer, HybridZOFO):
            raise TypeError(
                "SmoothnessCallback must be given to a HybridTrainer, got one that trains by "
                f"{type(optimizer).__name__}"
            )
        if args.world_size > 1:
            raise ValueError(
                "SmoothnessCallback must be used in one process, as it measures in one alone, got "
                f"{args.world_size} that train together; measure a checkpoint instead"
            )
        self._batches.clear()
        self.recorder = SmoothnessRecorder(optimizer, self._every, **self._options)
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name)
        if isinstance(saved, list):
            raise ValueError(f"callbacks must hold one {name}, got {len(saved)}")
        rows = saved["attributes"]["_saved"] if saved else None
        if rows is not None and state.global_step > 0:  # it resumes
            self.recorder.load_state_dict(rows)
        # checkpoints that were made without this callback have no place for it
        state.stateful_callbacks[name] = self.state()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches.clear()  # of a step that never came to its end
        self._due = state.global_step % self._every == 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._due:
            raise TypeError(
                "SmoothnessCallback must be given to a HybridTrainer with a training step of its "
                "own, which trains by a loss, got one that shows no batches"
            )

    def on_batch(
        self,
        trainer: HybridTrainerMixin,
        model: nn.Module,
        inputs: Mapping[str, Any],
        items: Any,
    ) -> None:
        """Called by a HybridTrainer before each micro-batch is trained.

        Args:
            trainer: it.
            model: as it is called.
            inputs: of the micro-batch.
            items: labels in all micro-batches of the step, where the Trainer counts them.
        """
        assert self.recorder is not None
        if not self._due:
            return
        self._batches.append((dict(inputs), items))
        if not trainer.accelerator.sync_gradients:
            return
        batches, self._batches, self._due = self._batches, [], False
        of_examples = trainer.hybrid_optimizer.settings.directions == "per_example"
        closures = [
            batch_closure(trainer, model, batch, items, len(batches), of_examples=of_examples)
            for batch, items in batches
        ]
        counts = Counts(trainer)
        model.train()  # as the step does that follows
        trainer.hybrid_optimizer.train()
        try:
            row = self.recorder.measure(closures, step=trainer.state.global_step)
        finally:
            counts.restore()
        logged = {
            f"{name}_{mode}": row.get(f"{name}_{mode}") for name in _LOGGED for mode in ("zo", "fo")
        }
        trainer.log({name: value for name, value in logged.items() if value is not None})
