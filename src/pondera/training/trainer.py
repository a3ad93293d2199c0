"""The training loop: transformers' Trainer, told how Pondera's losses add up and what a step may depend on.

Shapes: B batch, C context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from pondera.core.errors import Failure
from pondera.core.hf import checkpointing_arguments
from pondera.core.run_config import TrainConfig
from pondera.data.sampler import StepSampler, collate, mixed_seed
from pondera.evaluation.score import pass_counts
from pondera.models.adaptive_lm import IGNORED, AdaptiveLM, AdaptiveOutput


@dataclass
class Step:
    """What one optimizer step measured, over all micro-batches and processes.

    Args:
        loss: the weighted sum of the terms' means.
        terms: the mean of each loss term.
        grad_norm: before clipping.
        stop: some process was asked to end.
        shares: of the tokens that took each pass.
    """

    loss: float
    terms: dict[str, float]
    grad_norm: float
    stop: bool
    shares: list[float]


def learning_rate_share(step: int, settings: TrainConfig) -> float:
    """The learning rate of a step (counted from 0) as a share of the peak: linear warmup, then cosine to `min_lr`.

    Example:
        >>> settings = TrainConfig(steps=100, warmup=0.1, min_lr=0.1)
        >>> [round(learning_rate_share(step, settings), 3) for step in (0, 9, 10, 55, 100)]
        [0.1, 1.0, 1.0, 0.55, 0.1]
    """
    warmup = math.ceil(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, settings.steps - warmup))
    return settings.min_lr + (1 - settings.min_lr) * (1 + math.cos(math.pi * done)) / 2


def arguments(settings: TrainConfig, output_dir: str, num_processes: int) -> TrainingArguments:
    """The Trainer's arguments; everything that it would log, save or evaluate by itself is off."""
    share = settings.batch_size // num_processes
    micro_batch_size = min(settings.micro_batch_size or share, share)
    made = TrainingArguments(
        output_dir=output_dir,
        max_steps=settings.steps,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=math.ceil(share / micro_batch_size),
        max_grad_norm=settings.grad_clip,
        bf16=settings.dtype == "bfloat16",
        seed=settings.seed,
        **checkpointing_arguments(settings.gradient_checkpointing),
        ddp_find_unused_parameters=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        logging_nan_inf_filter=False,
        log_level="error",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),  # said aloud, or several processes on CPUs would not find each other
        use_cache=True,  # Pondera's forward does not read it; False would be saved with the model and slow generate
    )
    made._n_gpu = min(made.n_gpu, 1)  # several GPUs are used by several processes, never by DataParallel
    return made


class PonderaTrainer(Trainer):
    """A Trainer whose steps depend on the seed and the step's number, and on nothing else.

    The loss of a step is the sum over terms of weight * sum / count, where sums and counts run over all micro-batches
    and processes, so how a step is split changes nothing but rounding. Each step's random numbers are seeded from
    (seed, step, process): there is no random state to save, and a resumed training repeats what it would have been.

    Args:
        model: with parameters in float32.
        args: from `arguments`.
        settings: the ``train`` part of a run.
        dataset: windows of `pondera.data.corpus`.
        first_step: steps that are done already.
        callbacks: as the Trainer takes them.

    Attributes:
        order: which windows each step takes.
        latest: what the last step measured.
        stop_asked: set it to end after the current step, on whichever process.
    """

    def __init__(
        self,
        model: AdaptiveLM,
        args: TrainingArguments,
        settings: TrainConfig,
        dataset: Any,
        first_step: int = 0,
        callbacks: list | None = None,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=dataset, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        self.settings, self.first_step = settings, first_step
        self.loss_is_scaled_for_ga = True
        self.order = StepSampler(
            num_windows=len(dataset),
            batch_size=settings.batch_size,
            micro_batch_size=args.per_device_train_batch_size,
            steps=settings.steps,
            seed=settings.seed,
            first_step=first_step,
            rank=args.process_index,
            num_processes=args.world_size,
        )
        self.latest: Step | None = None
        self.stop_asked = False
        self._most_passes = math.ceil(model.passes())
        self._waits: list[bool] = []
        self._term_names: tuple[str, ...] = ()
        self._counts: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._took: list[tuple[int, ...]] = []
        self._weights: dict[str, float] = {}

    @property
    def lm(self) -> AdaptiveLM:
        """The model itself; where it is sharded, all processes have to call it together."""
        return cast(AdaptiveLM, self.model)

    def get_train_dataloader(self) -> DataLoader:
        """This process's micro-batches, in the order of `StepSampler`."""
        pin = self.args.device.type == "cuda"
        return DataLoader(
            cast(Dataset, self.train_dataset), batch_sampler=self.order, collate_fn=collate, pin_memory=pin
        )

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """AdamW, with weight decay on matrices (and embeddings) only; what `freeze_backbone_steps` keeps waiting in own groups."""
        if self.optimizer is None:
            lm, settings = cast(AdaptiveLM, model or self.lm), self.settings
            parameters = [p for p in lm.parameters() if p.requires_grad]
            of_method = {id(p) for p in lm.method.parameters()} if lm.method is not None else set()
            waiting = {id(p) for p in parameters if settings.freeze_backbone_steps and id(p) not in of_method}
            groups, self._waits = [], []
            for waits, matrices in product((False, True), (True, False)):
                chosen = [p for p in parameters if (id(p) in waiting) == waits and (p.ndim >= 2) == matrices]
                if chosen:
                    groups.append({"params": chosen, "weight_decay": settings.weight_decay if matrices else 0.0})
                    self._waits.append(waits)
            self.optimizer = AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """`learning_rate_share`, counted on from the first step; 0 for what still waits."""

        def share(steps_from_here: int, waits: bool) -> float:
            step = self.first_step + steps_from_here
            return (
                0.0
                if waits and step < self.settings.freeze_backbone_steps
                else learning_rate_share(step, self.settings)
            )

        shares = [partial(share, waits=waits) for waits in self._waits]
        self.lr_scheduler = LambdaLR(cast(Any, optimizer or self.optimizer), shares)
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of the next step; here everything that is drawn or counted once per step is."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        seed, step = self.settings.seed, self.state.global_step
        self.lm.begin_step(step, seed)
        torch.manual_seed(mixed_seed(seed, step, self.args.process_index))
        self._sums, self._took = {}, []
        self._counts = self._count(batches) if len(batches) > 1 else {}
        return batches, None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's part of the step's loss, times the processes over which gradients will be averaged."""
        outputs: AdaptiveOutput = model(**inputs)
        terms = outputs.terms or {}
        if not self._counts:  # a single micro-batch: its own forward pass tells what there is to count
            self._counts = self.over_processes({name: term.count for name, term in terms.items()})
        self._term_names = tuple(terms)
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0) + term.sum.detach().float()
            self._weights[name] = term.weight
        self._took.append(pass_counts(cast(Tensor, outputs.passes), self._most_passes))
        parts = [term.weight * term.sum / _divisor(self._counts[name]) for name, term in terms.items()]
        loss = torch.stack(parts).sum() * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _count(self, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The count of each loss term over a step of several micro-batches.

        The labels tell how many tokens are predicted. What a method counts may depend on what it thinks, so its terms
        cost one forward pass more, without gradient and with the same random numbers; codebooks forget it.
        """
        if self._term_names == ("next_token",) and self.lm.chunk is None:  # whose terms may begin after a warm-up
            labels = sum((batch["shift_labels"] != IGNORED).sum() for batch in batches)
            return self.over_processes({"next_token": labels})
        counts: dict[str, Any] = {}
        self.lm.train()
        with (
            _as_it_was(self.lm.chunk),
            torch.no_grad(),
            torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []),
        ):
            for batch in batches:
                for name, term in cast(Any, self.model_wrapped)(**self._prepare_inputs(batch)).terms.items():
                    counts[name] = counts.get(name, 0) + term.count
        return self.over_processes(counts)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once per step, when its gradient is whole and the weights are still as they were: sums up the step."""
        for parameter in self.lm.parameters():
            if parameter.requires_grad and parameter.grad is None:
                # What no token of this step has run, such as the gate of a late pass, still has a state to save.
                parameter.grad = torch.zeros_like(parameter)
        norm = super()._get_grad_norm(model, grad_norm)
        norm = float(cast(Tensor, norm.full_tensor() if isinstance(norm, DTensor) else norm))
        took_each = {f"pass {number}": sum(each) for number, each in enumerate(zip(*self._took, strict=True))}
        total = self.over_processes({**self._sums, **took_each, "stop": float(self.stop_asked)})
        stop, tokens = bool(total.pop("stop") > 0), float(total["pass 0"])
        shares = [float(total.pop(name)) / tokens for name in took_each]
        terms = {name: float(total[name] / _divisor(self._counts[name])) for name in total}
        loss = sum(self._weights[name] * mean for name, mean in terms.items())
        self.latest = Step(loss, terms, norm, stop, shares)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFinite(self.state.global_step + 1, self.latest, self.order.windows_of(self.state.global_step))
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not used: Pondera prices a step by its own account."""
        return 0

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Without autocast, so that what is measured here is what `score` measures later (shards, which FSDP itself
        casts, excepted)."""
        cast_forward = self.lm.__dict__.pop("forward", None)  # accelerate lays its own over that of the class
        try:
            yield
        finally:
            if cast_forward is not None:
                self.lm.forward = cast_forward

    def over_processes(self, values: dict[str, Any]) -> dict[str, Tensor]:
        """Each value summed over all processes."""
        vector = torch.stack(
            [torch.as_tensor(v, dtype=torch.float32, device=self.args.device) for v in values.values()]
        )
        return dict(zip(values, cast(Tensor, self.accelerator.reduce(vector, "sum")), strict=True))

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All weights, and the optimizer's state by parameter name, on the first process; empty on the others.

        To be called by all processes at once.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.lm, options=options)
        optimizer = get_optimizer_state_dict(self.lm, self._inner_optimizer(), options=options)
        return cast("dict[str, Tensor]", weights), cast("dict[str, Any]", optimizer)

    def restore_optimizer(self, state: dict[str, Any]) -> None:
        """Takes over what `snapshot` gave; only the first process needs to have it. To be called by all at once."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.args.world_size > 1)
        set_optimizer_state_dict(self.lm, self._inner_optimizer(), state, options=options)

    def _inner_optimizer(self) -> Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper


@contextmanager
def _as_it_was(method: nn.Module | None) -> Iterator[None]:
    """Afterwards all weights and buffers are what they were before: quantizers learn from every pass in training mode."""
    held = {} if method is None else method.state_dict(keep_vars=True)
    before = {name: tensor.detach().clone() for name, tensor in held.items()}
    yield
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(before[name])


def _divisor(count: Tensor) -> Tensor:
    return torch.where(count == 0, torch.ones_like(count), count)  # nothing was counted, and its sum is 0


class NotFinite(Failure):
    """A loss or gradient that is not a number.

    Args:
        step: the step that it happened in, counted from 1.
        measured: what the step measured.
        windows: the windows of its batch, over all processes.
    """

    def __init__(self, step: int, measured: Step, windows: list[int]) -> None:
        super().__init__(f"step {step}: loss {measured.loss}, gradient norm {measured.grad_norm}")
        self.step, self.measured, self.windows = step, measured, windows
