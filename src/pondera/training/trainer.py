"""The training loop: a transformers Trainer with exact loss averaging and random numbers seeded per step.

Shapes: B batch, C context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
from pondera.core.mixed_seed import mixed_seed
from pondera.core.run_config import TrainConfig
from pondera.data.sampler import StepSampler, collate
from pondera.evaluation.score import pass_counts
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.next_token import IGNORED
from pondera.models.output import AdaptiveOutput


@dataclass
class Step:
    """Measurements of one optimizer step, over all micro-batches and processes.

    Args:
        loss: the weighted sum of the means of the loss terms.
        terms: the mean of each loss term.
        grad_norm: the gradient norm before clipping.
        stop: whether any process received a request to stop.
        shares: the share of the tokens that took each pass.
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
    """The arguments of the Trainer; its own logging, saving and evaluation are off."""
    share = settings.batch_size // num_processes
    micro_batch_size = min(settings.micro_batch_size or share, share)
    training_arguments = TrainingArguments(
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
        use_cpu=not torch.accelerator.is_available(),  # must be explicit, or several CPU processes cannot connect
        use_cache=True,  # Pondera's forward ignores it; False would be saved with the model and slow down generate
    )
    training_arguments._n_gpu = min(training_arguments.n_gpu, 1)  # one process per GPU, never DataParallel
    return training_arguments


@dataclass(frozen=True, order=True)
class Pace:
    """How some parameters learn.

    Args:
        waits: part of the backbone, which `freeze_backbone_steps` freezes at first.
        scaled: added by a method, whose learning rate is multiplied by `lr_scale`.
        vectors: without weight decay, which only matrices and embeddings have.
    """

    waits: bool
    scaled: bool
    vectors: bool


def paced(lm: AdaptiveLM, settings: TrainConfig) -> dict[Pace, list[nn.Parameter]]:
    """The parameters that train by their pace, in a fixed order.

    With ``lr_scale=1`` the parameters of methods are with those of the backbone, unless one of them waits.
    """
    added, groups = {id(parameter) for parameter in lm.added_parameters()}, {}
    for parameter in lm.parameters():
        if parameter.requires_grad:
            own = id(parameter) in added
            pace = Pace(
                waits=settings.freeze_backbone_steps > 0 and not own,
                scaled=settings.lr_scale != 1 and own,
                vectors=parameter.ndim < 2,
            )
            groups.setdefault(pace, []).append(parameter)
    return dict(sorted(groups.items()))


class PonderaTrainer(Trainer):
    """A Trainer whose steps depend only on the seed and the step number.

    The loss of a step is the sum over loss terms of weight * sum / count. Sums and counts cover all micro-batches and
    processes, so splitting a step differently changes only rounding. Each step seeds its random numbers from
    (seed, step, process). There is no random state to save, and a resumed run gives the same weights as an uninterrupted one.

    Args:
        model: with parameters in float32.
        args: from `arguments`.
        settings: the ``train`` part of a run.
        dataset: windows of `pondera.data.corpus`.
        first_step: the number of completed steps.
        callbacks: passed to the Trainer.

    Attributes:
        order: the windows of each step.
        latest: measurements of the last step.
        stop_asked: set it to `True`, on any process, to stop after the current step.
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

    def ask_to_stop(self) -> None:
        """Stops after the current step."""
        self.stop_asked = True

    @property
    def lm(self) -> AdaptiveLM:
        """The model without wrappers; if it is sharded, all processes must call it together."""
        return cast(AdaptiveLM, self.model)

    def get_train_dataloader(self) -> DataLoader:
        """The micro-batches of this process, in the order of `StepSampler`."""
        pin = self.args.device.type == "cuda"
        return DataLoader(
            cast(Dataset, self.train_dataset), batch_sampler=self.order, collate_fn=collate, pin_memory=pin
        )

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """AdamW; parameters that learn differently, as their `Pace` says, are in groups of their own."""
        if self.optimizer is None:
            settings = self.settings
            paces = paced(cast(AdaptiveLM, model or self.lm), settings)
            groups = [
                {
                    "params": parameters,
                    "lr": settings.lr * (settings.lr_scale if pace.scaled else 1.0),
                    "weight_decay": 0.0 if pace.vectors else settings.weight_decay,
                }
                for pace, parameters in paces.items()
            ]
            self._waits = [pace.waits for pace in paces]
            self.optimizer = AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """`learning_rate_share`, starting at the first step; 0 for parameters that are still frozen."""

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
        """The micro-batches of the next step; also seeds the step and counts its loss terms."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        seed, step = self.settings.seed, self.state.global_step
        self.lm.begin_step(step, seed, step / self.settings.steps)
        torch.manual_seed(mixed_seed(seed, step, self.args.process_index))
        self._sums, self._took = {}, []
        self._counts = self._count(batches) if len(batches) > 1 else {}
        return batches, None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of the step's loss from this micro-batch, times the number of processes (DDP averages gradients)."""
        outputs: AdaptiveOutput = model(**inputs)
        terms = outputs.terms or {}
        if not self._counts:  # a single micro-batch: its own forward pass gives the counts
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

        The labels give the number of predicted tokens. The counts of other terms may depend on the forward pass, so they
        need an additional forward pass without gradient, with the same random numbers. Codebook updates are undone.
        """
        if self._term_names == ("next_token",) and self.lm.chunk is None:  # chunk methods may add terms after a warm-up
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
        """Sums up the step; the Trainer calls this once per step, after the backward pass and before the update."""
        for parameter in self.lm.parameters():
            if parameter.requires_grad and parameter.grad is None:
                # No token used this parameter (e.g. the gate of a late pass), but its optimizer state must exist to be saved.
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
        """Not used: Pondera computes the cost of a step itself."""
        return 0

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Disables autocast, so that validation gives the same numbers as a later `score` (except under FSDP, which
        casts by itself)."""
        cast_forward = self.lm.__dict__.pop("forward", None)  # accelerate overrides the forward of the class
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
        """All weights, and the optimizer state by parameter name, on the first process; empty on the others.

        All processes must call it together.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.lm, options=options)
        optimizer = get_optimizer_state_dict(self.lm, self._inner_optimizer(), options=options)
        return cast("dict[str, Tensor]", weights), cast("dict[str, Any]", optimizer)

    def restore_optimizer(self, state: dict[str, Any]) -> None:
        """Restores the optimizer state from `snapshot`, given on the first process; all processes must call it together."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.args.world_size > 1)
        set_optimizer_state_dict(self.lm, self._inner_optimizer(), state, options=options)

    def _inner_optimizer(self) -> Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper


@contextmanager
def _as_it_was(method: nn.Module | None) -> Iterator[None]:
    """Restores all weights and buffers on exit, because codebooks update in every forward pass in training mode."""
    state = {} if method is None else method.state_dict(keep_vars=True)
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    yield
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(before[name])


def _divisor(count: Tensor) -> Tensor:
    return torch.where(count == 0, torch.ones_like(count), count)  # if the count is 0, the sum is 0 too


class NotFinite(Failure):
    """The loss or the gradient norm is not finite.

    Args:
        step: the failing step, counted from 1.
        measured: the measurements of that step.
        windows: the windows of its batch, over all processes.
    """

    def __init__(self, step: int, measured: Step, windows: list[int]) -> None:
        super().__init__(f"step {step}: loss {measured.loss}, gradient norm {measured.grad_norm}")
        self.step, self.measured, self.windows = step, measured, windows
