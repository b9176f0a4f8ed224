"""Checkpoints of a trainer: what its own files do not hold of what HybridZOFO trains."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from torch import nn

from .base_weights import load_base_weights, save_base_weights
from .optimizer import HybridZOFO
from .quantized import Scales
from .quantized.checkpoints import (
    FILES,
    has_no_files_of_its_own,
    load_trained,
    remove_weights,
    save_trained,
)

if TYPE_CHECKING:
    from transformers import Trainer as _Base

    from .partition.trainer import TrainerPartition
else:
    _Base = object


class SavingMixin(_Base):
    """Saves and resumes the base model's weights, which peft does not save, and the partition."""

    _group_options: dict[str, Any]
    _partition: TrainerPartition | None
    if TYPE_CHECKING:

        @property
        def hybrid_optimizer(self) -> HybridZOFO: ...

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        if self.optimizer is not None and has_no_files_of_its_own(self._module()):
            super()._save(output_dir, state_dict={})
            if self.args.should_save:
                place = output_dir or str(self.args.output_dir)
                remove_weights(place)
                save_trained(self.hybrid_optimizer, self._module(), place)
            return
        super()._save(output_dir, *args, **kwargs)
        if self.args.should_save and self.optimizer is not None and self._saves_in_part():
            folder = output_dir or self.args.output_dir
            assert folder is not None
            save_base_weights(self.hybrid_optimizer, self._module(), folder)
        if self.args.should_save and self._partition is not None:
            self._partition.save(output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        if self._group_options.get("quantized") in ("scales", "low_rank"):
            self.create_optimizer()  # side updates must be there, and units are those of the start
        if has_no_files_of_its_own(self._module()):
            load_trained(self._module(), resume_from_checkpoint)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        if self._saves_in_part():
            load_base_weights(self._module(), resume_from_checkpoint)
        if self._partition is not None:
            trainer: Any = self
            self._partition.load(trainer, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and has_no_files_of_its_own(self._module()):
            load_trained(self._module(), best)
            return
        super()._load_best_model()
        if self._saves_in_part() and best is not None and os.path.isdir(best):
            model: Any = self._module()
            active = getattr(model, "active_adapters", ())
            for adapter in () if callable(active) else active:  # a method where peft is within
                # the Trainer looks for an adapter of the name "default" only
                if os.path.isdir(folder := os.path.join(best, adapter)):
                    model.load_adapter(folder, adapter, is_trainable=True)
            load_base_weights(model, best)

    def _push_from_checkpoint(self, checkpoint_folder: str, *args: Any, **kwargs: Any) -> None:
        for name in FILES:
            if os.path.isfile(ours := os.path.join(checkpoint_folder, name)):
                assert self.args.output_dir is not None
                shutil.copy(ours, os.path.join(self.args.output_dir, name))
        super()._push_from_checkpoint(checkpoint_folder, *args, **kwargs)

    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _saves_in_part(self) -> bool:
        """Whether the Trainer's own files lack what is learnt, or do not load into a model."""
        model = self._module()
        learns = self._group_options.get("quantized") == "scales"
        if self.optimizer is not None:
            groups = self.hybrid_optimizer.zo_groups()
            learns |= bool(Scales(model).among(p for group in groups for p in group.params))
        return learns or any(hasattr(module, "peft_config") for module in model.modules())
