"""The training callback: metrics, validation, checkpoints and early stop between optimizer steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback

from pondera.core import metric
from pondera.core.errors import Failure, UserError
from pondera.core.run_config import RunConfig
from pondera.core.run_folder import Run
from pondera.data.corpus import AnyCorpus
from pondera.evaluation.cost_report import cost_report
from pondera.evaluation.halting_collapse import halting_rule
from pondera.evaluation.halting_stats import HALTING_STATS
from pondera.evaluation.permuted_passes import permuted_scores
from pondera.evaluation.score import ScoreSums, score
from pondera.evaluation.task_score import TaskScores
from pondera.evaluation.trace import TRACED, trace, trace_halting
from pondera.models import checkpoints
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.training.lora import merged, own_parameters, trained_parameters
from pondera.training.progress import ProgressMeter
from pondera.training.trainer import PonderaTrainer, learning_rate_share

SURVEYED = 4096  # maximum held-out tokens for the halting statistics
SCORES = ("loss", "perplexity", "bits_per_byte", "error", "accuracy", "passes_per_token")
PRICES = ("inference_flops_per_token", "training_flops_per_token", "kv_bytes_per_token")


class RunCallback(TrainerCallback):
    """Writes the run folder while a `PonderaTrainer` trains.

    All processes decide alike, because every decision uses values summed over all processes. The first process writes.

    Args:
        run: the run folder.
        config: the config of the run.
        corpus: the text for training and validation.
        model: the model to train.
        start: the checkpoint to resume from (default: `None`).
        show: show progress.

    Attributes:
        trainer: must be set before training.
        first_step: the number of completed steps.
        validation: the scores of the validation after the latest step, or `None` if that step had none.
        stopped: training stopped early on request.
    """

    trainer: PonderaTrainer

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        corpus: AnyCorpus,
        model: AdaptiveLM,
        start: Path | None,
        show: bool,
    ) -> None:
        self.run, self.config, self.corpus, self.model, self.start = run, config, corpus, model, start
        state = checkpoints.read_state(start) if start else {"step": 0, "seconds": 0.0, "since": _nothing(), "took": []}
        self.first_step: int = state["step"]
        self.seconds: float = state["seconds"]
        self.since: dict[str, Any] = state["since"]
        self.took: list[float] = state["took"]  # by pass: the share of the tokens that took it, summed over steps
        self.parameters, self.trained_parameters = own_parameters(model), trained_parameters(model)
        self.validation: dict[str, Any] | None = None
        self.stopped = False
        self.watch = ProgressMeter(config.train.steps, self.first_step, show)
        self._clock = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores optimizer state and step from the checkpoint."""
        state.global_step = self.first_step
        if self.start is not None:
            main = self.trainer.is_world_process_zero()
            self.trainer.restore_optimizer(checkpoints.read_optimizer(self.start) if main else {})
        self._clock = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logs, validates and saves at the configured intervals."""
        measured, settings, step = self.trainer.latest, self.config.train, state.global_step
        assert measured is not None
        now = time.monotonic()
        self.seconds += now - self._clock
        since = self.since
        since["steps"] += 1
        since["seconds"] += now - self._clock
        since["loss"] += measured.loss
        self.took = [a + b for a, b in zip(self.took or [0.0] * len(measured.shares), measured.shares, strict=True)]
        for name, mean in measured.terms.items():
            since["terms"][name] = since["terms"].get(name, 0.0) + mean

        last = step >= settings.steps
        # Several processes must stop after the same step, so they use the summed flag. A single process can stop at once.
        alone = self.trainer.args.world_size == 1
        self.stopped = (measured.stop or (alone and self.trainer.stop_asked)) and not last
        line = self._line(step) if last or step % settings.log_every == 0 else {}
        speed = since["steps"] * self._tokens_per_step / since["seconds"]
        if line:
            self.since = _nothing()
        if last or step % settings.eval_every == 0:
            self.validation = self.validate()
            line["validation"] = {name: self.validation[name] for name in SCORES if name in self.validation}
        else:
            self.validation = None
        if line:
            self.on_main(lambda: self.run.log(**self._progress(step), **line))
        if last or self.stopped or step % settings.save_every == 0:
            self._save(step)
        self.watch.step(step, line.get("loss", measured.loss), speed, logged="loss" in line)
        if self.stopped:
            control.should_training_stop = True
        self._clock = time.monotonic()

    def validate(self) -> dict[str, Any]:
        """Scores the model on the held-out text; all processes must call it together, and each scores a part."""
        scores = self._score()
        name = metric.score_name([scores])
        self.watch.validated = f"{metric.SCORES[name]} {scores[name]:.4f}"
        return scores

    def _score(self, permute: bool = False) -> dict[str, Any]:
        trainer, data = self.trainer, self.config.data
        with trainer.full_precision():
            return score(
                trainer.lm,
                self.corpus.validation,
                data.context,
                self.config.train.eval_tokens,
                batch_size=self._eval_batch_size,
                document_mask=data.document_mask,
                rank=trainer.args.process_index,
                num_processes=trainer.args.world_size,
                total=self._over_processes,
                permute=permute,
            )

    def _over_processes(self, sums: ScoreSums | TaskScores) -> ScoreSums | TaskScores:
        numbers = {str(place): number for place, number in enumerate(sums.numbers())}
        return sums.with_numbers([float(number) for number in self.trainer.over_processes(numbers).values()])

    def result(self) -> dict[str, Any]:
        """The result of the run; costs use the measured share of the tokens that took each pass."""
        steps = self.config.train.steps
        tokens = steps * self._tokens_per_step
        validation = self.validation or self.validate()
        prices = self._prices(validation["pass_shares"])
        return {
            **validation,
            **permuted_scores(self.trainer.lm, self._score),
            "inference_flops_per_token": prices["inference_flops_per_token"],
            "train_flops": self._progress(steps)["train_flops"],
            "train_tokens": tokens,
            "train_seconds": self.seconds,
            "train_tokens_per_second": tokens / self.seconds,
            "kv_bytes_per_token": prices["kv_bytes_per_token"],
            "parameters": self.parameters,
            **({"trained_parameters": self.trained_parameters} if self.config.train.lora else {}),
            "halting_rule": halting_rule(self.model),
            "vocabulary": self.corpus.vocab_size,
            "corpus": self.corpus.digest,
        }

    def write_sample(self) -> None:
        """Writes the traces: the first held-out tokens one by one, and halting statistics over more of them."""
        data, tokenizer = self.config.data, self.corpus.tokenizer()
        text = cast(str, tokenizer.decode(self.corpus.validation.ids[:TRACED].tolist(), skip_special_tokens=True))
        tokens = min(SURVEYED, self.config.train.eval_tokens)
        with self.trainer.full_precision(), suppress(UserError):
            # Windows of one token cannot be traced, which must not fail a finished run.
            self.run.write_trace("sample", trace(self.model, tokenizer, text, data.context))
            self.run.write_trace(
                HALTING_STATS,
                trace_halting(self.model, self.corpus, data.context, tokens, self._eval_batch_size, data.document_mask),
            )

    def on_main(self, write: Callable[[], None]) -> None:
        """Writes on the first process; if it fails, all processes raise.

        Raises:
            Failure: the first process could not write.
        """
        failure: Failure | None = None
        if self.trainer.is_world_process_zero():
            try:
                write()
            except Failure as error:
                failure = error
            except OSError as error:
                failure = Failure(f"{self.run.path}: cannot be written ({error}); free disk space, then use --resume")
        if self.trainer.over_processes({"failures": float(failure is not None)})["failures"] > 0:
            raise failure or Failure("the first process could not write the run folder; see its message")

    def _save(self, step: int) -> None:
        weights, optimizer = self.trainer.snapshot()
        weights, lora = merged(weights, self.config.train)
        state = {"step": step, "seconds": self.seconds, "since": self.since, "took": self.took}
        state["corpus"] = self.corpus.digest
        tokenizer, keep = self.corpus.tokenizer_path, self.config.train.keep
        self.on_main(
            lambda: checkpoints.save(self.run, step, self.model, weights, optimizer, state, tokenizer, keep, lora)
        )

    def _line(self, step: int) -> dict[str, Any]:
        """The means since the last line of metrics, and the gradient norm of the last step."""
        settings, since, measured = self.config.train, self.since, self.trainer.latest
        assert measured is not None
        return {
            "loss": since["loss"] / since["steps"],
            "terms": {name: total / since["steps"] for name, total in since["terms"].items()},
            "lr": settings.lr * learning_rate_share(step - 1, settings),
            "grad_norm": measured.grad_norm,
            "tokens_per_second": since["steps"] * self._tokens_per_step / since["seconds"],
            "seconds": self.seconds,
        }

    def _progress(self, step: int) -> dict[str, Any]:
        """The x axes of the curves: step, tokens and training FLOPs."""
        shares = [share / step for share in self.took]
        tokens, flops = step * self._tokens_per_step, self._prices(shares)["training_flops_per_token"]
        return {"step": step, "tokens": tokens, "train_flops": None if flops is None else tokens * flops}

    def _prices(self, shares: list[float]) -> dict[str, Any]:
        try:
            train = self.config.train
            context, recompute = self.config.data.context, train.gradient_checkpointing
            return cost_report(self.model, context, recompute, shares, lora=train.lora)
        except UserError:
            return dict.fromkeys(PRICES)  # training does not need the cost of the architecture

    @property
    def _eval_batch_size(self) -> int:
        return min(8, self.trainer.args.per_device_train_batch_size)  # a batch that fits in training also fits here

    @property
    def _tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.data.context


def _nothing() -> dict[str, Any]:
    return {"steps": 0, "seconds": 0.0, "loss": 0.0, "terms": {}}
