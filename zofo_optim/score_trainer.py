"""transformers' Trainer where there is only a score: no loss, no labels, no gradients.

Needs transformers, so it is not imported by ``zofo_optim`` itself::

    from zofo_optim.score_trainer import ScoreConfig, ScoreTrainer
"""

from __future__ import annotations

import copy
import os
import random
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.trainer_utils import EvalLoopOutput

from zofo_kernels._torch_compat import without_torch_functions

from .completions import Rows, Writer, check_prompts, lay_out, of_a_population
from .engines.base import Engine
from .evaluation import GlobalRandomState
from .freezing import patterns_of_frozen
from .rewards import RewardFunction, RewardFunctions, shape_scores, without_rounding
from .sampling import common_noise
from .score_config import ScoreConfig
from .score_logs import ScoreLogs
from .trainer import HybridTrainer

__all__ = ["ScoreConfig", "ScoreTrainer"]

_HYBRID = dict(
    structure="low_rank",
    perturbation="streamed",
    directions="per_example",
    estimator="antithetic",
    zo_rule="normalized",
)
_ZO = dict(mu=2e-2, maximize=True)


class ScoreTrainer(HybridTrainer):
    """Trains a language model by scores of what it writes, in the memory of ``generate()``.

    One ``generate()`` a step evaluates a whole population: the completions of a prompt decode under
    directions of their own, in pairs that are displaced forth and back, and the weights move along
    the directions by the differences of their rewards (evolution strategies with low-rank
    directions). Data set, reward functions and metrics are as for TRL's ``GRPOTrainer``; saving,
    resuming, schedules, callbacks, accumulation and best weights are transformers'.

    What trains: the parameters that require gradients, or where none does, all; but for those that
    cannot have a direction for each completion, such as embeddings of positions. The trainer
    freezes them, since nothing takes a gradient. Dropout is off.

    Started by ``torchrun`` or ``accelerate launch``, the population is spread over the processes:
    each writes and scores completions of prompts of its own, and all make the same update.
    Rewards are scaled among those of all, logs are of all, and evaluations are shared out.
    ``per_device_train_batch_size`` counts the completions of one process.

    The step's ``loss`` in logs is the negative mean reward. Logged too, under TRL's names and by
    its formulas: ``reward``, ``reward_std``, ``rewards/<function>/mean``,
    ``completions/mean_length``, ``completions/clipped_ratio`` (of completions without an end),
    ``frac_reward_zero_std`` (of prompts whose rewards are all equal, and which teach nothing),
    ``kl`` (per token); and ``completions/unscored``, the completions whose reward is not finite:
    their pairs count nothing. Prompts that end with an assistant's message are gone on with.

    Args:
        model: a causal or encoder-decoder language model, or the name of one.
        reward_funcs: of completions; see :class:`zofo_optim.rewards.RewardFunctions`. They are
            called with ``prompts``, ``completions``, ``completion_ids``, the data set's other
            columns, ``trainer_state``, ``log_extra`` and ``log_metric``, by name.
        args: :class:`ScoreConfig`; None: its defaults, in the folder "tmp_trainer".
        train_dataset: with a column ``prompt``: texts, or conversations (lists of messages), which
            go through the tokenizer's chat template.
        eval_dataset: likewise. Evaluations generate at the weights, with the same noise each time.
        processing_class: the tokenizer; None: that of the model's name.
        callbacks, optimizers: as for the Trainer.
        zo: options of the weights' group, such as ``mu`` (default 2e-2) or ``lr`` (default
            ``learning_rate`` of the arguments).
        include, exclude: which parameters train; see :func:`hybrid_param_groups`.
        hybrid: options of :class:`HybridZOFO`, such as ``rank`` (default 1) or ``zo_rule`` (default
            "normalized"). Directions are per example, low rank, streamed and antithetic.
        engine: what generates, and follows the updates; see :class:`zofo_optim.engines.Engine`. Of
            several processes, each has its own. It must serve the model's weights; the model stays
            on the CPU (``use_cpu=True``). None: this process.

    Raises:
        TypeError: an argument of another type, such as a reward function that cannot be called.
        ValueError: there are fewer prompts than a step needs, an adapter trains (which needs
            gradients: freeze or merge it), options do not fit, or the engine cannot displace what
            trains (narrow it by ``include``).
        RuntimeError: in a step: a reward function raised; names the completion. The weights are
            then as before.

    Example:
        >>> def brevity(completions, **kwargs):
        ...     return [-len(text) for text in completions]
        >>> trainer = ScoreTrainer(
        ...     "facebook/opt-125m",
        ...     brevity,
        ...     ScoreConfig("out", max_steps=2, max_completion_length=8, report_to=[]),
        ...     train_dataset=[{"prompt": "It was great."}, {"prompt": "It was terrible."}],
        ... )
        >>> trainer.train()
    """

    args: ScoreConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: ScoreConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        *,
        zo: Mapping[str, Any] | None = None,
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        hybrid: Mapping[str, Any] | None = None,
        engine: Engine | None = None,
        **kwargs: Any,
    ) -> None:
        args = ScoreConfig("tmp_trainer") if args is None else args
        if not isinstance(args, ScoreConfig):
            raise TypeError(f"args must be a ScoreConfig, got {type(args).__name__}")
        if kwargs.get("partition") is not None:
            raise ValueError(
                "partition must be left out, as a score has no gradients by which tensors could "
                f"train, got {kwargs['partition']!r:.80}"
            )
        self.rewards = RewardFunctions(reward_funcs, args.reward_weights)
        if isinstance(model, str):
            name, model = model, AutoModelForCausalLM.from_pretrained(model)
            processing_class = processing_class or AutoTokenizer.from_pretrained(name)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        frozen = patterns_of_frozen(model)
        given: dict[str, Any] = dict(zo=zo, include=include, exclude=exclude, hybrid=hybrid)
        accelerator: Any = args.accelerator_config
        if accelerator.dispatch_batches is None:
            accelerator.dispatch_batches = False  # it knows batches of tensors only
        if optimizers[0] is None:
            ours = {**_ZO, "lr": args.learning_rate, "weight_decay": args.weight_decay}
            given["zo"] = {**ours, **(zo or {})}
            given["exclude"] = [*([exclude] if isinstance(exclude, str) else exclude), *frozen]
            if "examples_per_direction" in (hybrid or {}):
                raise ValueError(
                    "hybrid must not have examples_per_direction: it is prompts_per_direction in "
                    "args"
                )
            together = {"examples_per_direction": args.prompts_per_direction}
            given["hybrid"] = {**_HYBRID, **together, **(hybrid or {})}
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=list,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            **given,
            **kwargs,
        )
        self._check_prompts()
        if optimizers[0] is not None:
            self._check_given()
        self._engine = engine
        self._writer = Writer(model, processing_class, args)
        self._logs = ScoreLogs(self.rewards.names)
        self._verified = False
        self.ref_model = copy.deepcopy(model).eval().to(args.device) if args.beta > 0 else None
        """The start, with ``beta`` > 0."""
        if engine is not None:
            self._check_engine()
            self.create_optimizer()  # now: what is loaded later reaches the engine by it
            engine.attach(self.hybrid_optimizer, model)

    def _check_engine(self) -> None:
        for name, wanted in (("beta", 0), ("common_noise", True)):
            if getattr(self.args, name) != wanted:
                raise ValueError(
                    f"{name} must be {wanted} with an engine, got {getattr(self.args, name)!r}"
                )

    def _check_prompts(self) -> None:
        for name in ("train_dataset", "eval_dataset"):
            dataset = getattr(self, name)
            for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
                if part is not None:
                    first = next(iter(part), None)
                    if first is None:
                        raise ValueError(f"{name} must have prompts, got none")
                    check_prompts([first])
        wanted, there = self.args.prompts_of_a_step * self._processes, self.train_dataset
        if there is not None and hasattr(there, "__len__") and len(there) < wanted:
            times = "" if self._processes == 1 else f", in each of {self._processes} processes"
            raise ValueError(
                f"train_dataset must have the {wanted} prompts of a step, got {len(there)}: "
                f"per_device_train_batch_size / num_generations{times}; raise num_generations, or "
                "repeat prompts"
            )

    def _check_given(self) -> None:
        """An optimizer that was made elsewhere does what the arguments say."""
        optimizer = self.hybrid_optimizer
        if any(not group.options["maximize"] for group in optimizer.zo_groups()):
            raise ValueError(
                "optimizers must hold a HybridZOFO with maximize=True, or rewards would fall"
            )
        together = optimizer.settings.examples_per_direction
        if together != self.args.prompts_per_direction:
            raise ValueError(
                "optimizers must hold a HybridZOFO with examples_per_direction="
                f"{self.args.prompts_per_direction}, the prompts_per_direction of args, got "
                f"{together}"
            )

    def _check_estimator(self, estimator: str) -> None:
        if estimator != "antithetic":
            raise ValueError(
                "hybrid must have estimator='antithetic', by which one generate() evaluates both "
                f"sides, got {estimator!r}"
            )

    def _check_own_loss(self) -> None:
        """There is none."""

    # ---- batches of prompts -------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's, of so many prompts as have ``per_device_train_batch_size`` completions."""
        completions = self._train_batch_size
        self._train_batch_size = completions // self.args.num_generations
        try:
            return super().get_train_dataloader()
        finally:
            self._train_batch_size = completions

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The Trainer's, likewise."""
        return self._of_prompts(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """The Trainer's, likewise."""
        return self._of_prompts(super().get_test_dataloader(test_dataset))

    def _of_prompts(self, found: DataLoader[Any]) -> DataLoader[Any]:
        """Batches of so many prompts as have the arguments' completions; none is left out."""
        prompts = max(1, self.args.eval_batch_size // self.args.generations_eval)
        return DataLoader(found.dataset, batch_size=prompts, collate_fn=list)

    def _rows(self, examples: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> Rows:
        check_prompts(examples)
        tokens = [self._writer.encode(example["prompt"]) for example in examples]
        return lay_out(examples, tokens, numbers)

    # ---- a step -----------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Generate a population, score it, and keep what it says of the directions."""
        config, optimizer = self.args, self.hybrid_optimizer
        model = self.accelerator.unwrap_model(model).eval()
        together = optimizer.settings.examples_per_direction
        rows = self._rows(inputs, of_a_population(len(inputs), config.num_generations, together))
        parts = self._micro_batches()

        def scores(displaced: Any = None) -> list[float]:
            reward = self._population(model, rows, displaced)
            return [float(score) / parts for score in self._scaled(reward, rows)]

        accumulates = optimizer.accumulated is not None
        with self._noise_of_process(self._parts if accumulates else 0):
            if self._engine is None:
                self._verify_once(model, rows)
                optimizer.backward(scores)
            else:
                optimizer.tell(scores(optimizer.ask(len(rows.prompts))))
        self._keep_slopes(accumulates)
        return torch.tensor(-self._logs.last_reward / parts, device=self.args.device)

    @contextmanager
    def _noise_of_process(self, part: int) -> Generator[None, None, None]:
        """Where several processes train, each samples with noise of its own, in rewards too.

        It follows from the seed, the step, its part and the process, whatever came before.
        """
        if self._processes == 1:
            yield
            return
        place = [self.args.seed, self.state.global_step, part, self.accelerator.process_index]
        before = GlobalRandomState([self.args.device])
        seeds = np.random.SeedSequence(place).generate_state(3, np.uint64).tolist()
        try:
            torch.manual_seed(seeds[0])
            random.seed(seeds[1])
            np.random.seed(seeds[2] % 2**32)  # noqa: NPY002 (the legacy generator is the global one)
            yield
        finally:
            before.restore()

    def _verify_once(self, model: Any, rows: Rows) -> None:
        """By logits of two tokens of a few rows; texts would take long, and their scores may not
        tell."""
        if self._verified:
            return
        few = 2 * self.hybrid_optimizer.settings.examples_of_a_direction
        some = Rows(rows.prompts[:few], rows.tokens[:few], rows.groups[:few], {})
        with torch.no_grad():
            self.hybrid_optimizer.verify(lambda: self._probed(model, some))
        self._verified = True

    def _probed(self, model: Any, rows: Rows) -> Tensor:
        with self.compute_loss_context_manager():
            return self._writer.probe(model, rows, self.args.device)

    def _population(self, model: Any, rows: Rows, displaced: Any) -> np.ndarray:
        """The reward of each row, less what the KL divergence costs."""
        if self._engine is not None:
            tokens = self._engine.generate(rows.tokens, displaced, self._writer.config)
        else:
            shares = self.args.common_noise and self._writer.config.do_sample
            noise = common_noise(self.hybrid_optimizer) if shares else nullcontext()
            with noise, self.compute_loss_context_manager():
                tokens = self._writer.write(model, rows, self.args.device)
        return self._scored(rows, tokens, self._divergence(model, rows, tokens))

    def _divergence(self, model: Any, rows: Rows, tokens: list[list[int]]) -> np.ndarray | None:
        """log p - log p_start per token of each completion, each row under its displacement.

        None without a start to compare with.
        """
        if self.ref_model is None:
            return None
        with torch.no_grad(), self.compute_loss_context_manager():
            ours, start = (
                self._writer.log_probs(one, rows, tokens, self.args.device).double().cpu()
                for one in (model, self.ref_model)
            )
        return (ours - start).numpy() / np.maximum(1, [len(some) for some in tokens])

    def _scored(
        self, rows: Rows, tokens: list[list[int]], kl: np.ndarray | None = None
    ) -> np.ndarray:
        """Call the reward functions, which see torch as outside of a step, and keep for the log."""
        decoded = zip(rows.prompts, tokens, strict=True)
        texts = [self._writer.decode(prompt, made) for prompt, made in decoded]
        with without_torch_functions(), torch.enable_grad():
            scored = self.rewards(
                texts,
                prompts=rows.prompts,
                completion_ids=tokens,
                **rows.columns,
                trainer_state=self.state,
                log_extra=self._logs.log_extra,
                log_metric=self._logs.log_metric,
            )
        if not np.isfinite(scored.total).any():
            warnings.warn(
                "reward functions gave none of the completions a finite reward, so a step learns "
                "nothing from them",
                stacklevel=2,
            )
        reward = scored.total if kl is None else scored.total - self.args.beta * kl
        complete = [self._writer.is_complete(some) for some in tokens]
        lengths = [len(some) for some in tokens]
        self._logs.add(rows, texts, lengths, complete, scored, reward, kl)
        return reward

    def _scaled(self, reward: np.ndarray, rows: Rows) -> np.ndarray:
        """The rewards of this process's rows, shaped among those of all processes."""
        with without_torch_functions():
            of_all = gather_object([(reward, rows.groups)])
        rewards = np.concatenate([some for some, _ in of_all])
        groups = [(place, group) for place, (_, some) in enumerate(of_all) for group in some]
        shaped = _shaped(rewards, groups, self.args.scale_rewards)
        before = sum(len(some) for some, _ in of_all[: self.accelerator.process_index])
        return shaped[before : before + len(reward)]

    # ---- evaluation -------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Rewards of completions at the weights; the global random state is as before."""
        model = self.accelerator.unwrap_model(self.model)
        was_training, count = model.training, 0
        process = self.accelerator.process_index
        training, self._logs = self._logs, ScoreLogs(self.rewards.names)
        before = GlobalRandomState([self.args.device])
        try:
            model.eval()
            set_seed(self.args.seed + process)
            with torch.no_grad():
                # batches by turns
                for examples in islice(dataloader, process, None, self._processes):
                    count += len(examples)
                    each = range(len(examples))
                    numbers = [i for i in each for _ in range(self.args.generations_eval)]
                    rows = self._rows(examples, numbers)
                    tokens = self._written(model, rows)
                    self._scored(rows, tokens, self._divergence(model, rows, tokens))
                    self.control = self.callback_handler.on_prediction_step(
                        self.args, self.state, self.control
                    )
            self._logs.take_in(gather_object, together=False)
            metrics = self._logs.metrics()
        finally:
            self._logs = training
            before.restore()
            model.train(was_training)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(np.empty(0), None, named, sum(gather_object([count])))

    def _written(self, model: Any, rows: Rows) -> list[list[int]]:
        """Completions at the weights as they are."""
        if self._engine is not None:
            seeds = torch.randint(2**62, (len(rows.prompts),)).tolist()
            return self._engine.generate(rows.tokens, None, self._writer.config, seeds)
        with self.compute_loss_context_manager():
            return self._writer.write(model, rows, self.args.device)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._engine is not None:
            self._engine.synchronise(compare=True)

    # ---- logs -------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with the metrics of the steps since, and their completions."""
        if "loss" in logs and self._logs:
            self._logs.take_in(gather_object, together=True, texts=self.args.log_completions)
            logs.update(self._logs.metrics())
            if self.args.log_completions and self.is_world_process_zero():
                folder = os.path.join(self.args.output_dir or ".", "completions")
                file = os.path.join(folder, f"completions_{self.state.global_step:05d}.parquet")
                self._logs.table(self.state.global_step).to_parquet(file)
                self._logs.show(self.state.global_step, self.args.num_completions_to_print)
            self._logs.clear()
        super().log(logs, *args, **kwargs)


def _shaped(rewards: np.ndarray, groups: Sequence[Any], scale: str) -> np.ndarray:
    if scale == "none":
        return without_rounding(rewards)
    if scale == "centered_rank":
        return shape_scores(rewards, "centered_rank")
    return shape_scores(rewards, groups=groups if scale == "group" else None)
