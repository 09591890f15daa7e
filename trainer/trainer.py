"""The training loop: one for all stages.

A stage is data + loss + starting weights. `fit` does the rest: batches, precision, accumulation, clipping, schedule,
validation, logging, saving, resuming, stopping. "Step" always means optimizer step.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError, first_line, stop_signals
from common.files import write_json
from data_pipeline.datasets import Batch, BatchLoader, Dataset, Schedule
from data_pipeline.packing import derive_seed
from model.device import is_out_of_memory, resolve_device, resolve_dtype
from model.LMConfig import LMConfig
from model.model import parameter_counts
from trainer.checkpoint import TrainingCheckpoint, find_state, hold_run, save_state
from trainer.distributed import (
    DistEnv,
    all_gather_object,
    all_reduce_sum,
    assert_same_on_all_ranks,
    barrier,
    broadcast_object,
)
from trainer.loggers import RankLog
from trainer.losses import LossFunction
from trainer.metrics import MetricsLogger, StepTimer, make_profiler, means_of
from trainer.optim import get_lr
from trainer.options import TrainOptions
from trainer.parallel import make_strategy
from trainer.parallel.ddp import DDPStrategy, ParallelStrategy

COUNTS = ("n_targets", "n_tokens", "attention_pairs")  # of a batch, summed over a step
STOPPING = "stopping after this step (Ctrl-C again: at once, back to the last saved state)"
EXPLODED = 3.0  # nats by which no healthy loss rises: every target would be 20 times less probable than before


@dataclass(frozen=True)
class Run:
    """The name, model and identity of a training run.

    Attributes:
        stage: "pretrain", "full_sft", ...
        name: of its files in --out_dir, such as "pretrain_512".
        config: of the model.
        identity: what has to be the same to resume it, beside data and flags: tokenizer, starting weights.
        save_weights: write the weights so far for later stages; takes a description of how they were made, and the
            trained tensors with their names, one at a time.
        sample: return what the model writes from fixed prompts: {"prompt", "text"}; for --sample_interval.
    """

    stage: str
    name: str
    config: LMConfig
    identity: dict
    save_weights: Callable[[dict, Iterable[tuple[str, Tensor]]], None]
    sample: Callable[[nn.Module], list[dict[str, str]]] | None = None


def fit(
    model: nn.Module,
    loss_fn: LossFunction,
    train: Dataset,
    val: Dataset | None,
    options: TrainOptions,
    run: Run,
    dist_env: DistEnv,
    before_training: Callable[[nn.Module], None] | None = None,
    make_loader: Callable[..., BatchLoader] = BatchLoader,
) -> dict:
    """Train `model` as `options` say, in place (its parameters may end up sharded); return the last metrics.

    before_training: called on every process with the model that has its starting weights, whole or sharded.
    make_loader: takes what `BatchLoader` takes; for batches that depend on the model.

    Raises UserError if there is nothing to resume, the state to resume belongs to a different run, the loss becomes
    non-finite, or the disk is full; SystemExit (128 + signal) after a clean stop on SIGTERM or Ctrl-C.
    """
    trainer = Trainer(model, loss_fn, train, val, options, run, dist_env, make_loader)
    with hold_run(options.out_dir, run.name) if dist_env.is_main else contextlib.nullcontext(), trainer.log:
        trainer.prepare(before_training)
        with (
            stop_signals(STOPPING if dist_env.is_main else "") as received,
            trainer.metrics_logger,
            trainer.profiler or contextlib.nullcontext(),
        ):
            return trainer.run_steps(received)


@dataclass(eq=False)
class Trainer:
    """The state of a run. Read `step` first: it is one optimizer step, from batch to new weights."""

    model: nn.Module
    loss_fn: LossFunction
    train: Dataset
    val: Dataset | None
    options: TrainOptions
    run: Run
    dist_env: DistEnv
    make_loader: Callable[..., BatchLoader] = BatchLoader
    strategy: ParallelStrategy = field(init=False)
    metrics_logger: MetricsLogger = field(init=False)

    def __post_init__(self) -> None:
        options, run, dist_env = self.options, self.run, self.dist_env
        self.device = resolve_device(options.device)
        if self.device.type == "cuda":
            if self.device.index is None:
                self.device = torch.device("cuda", dist_env.local_rank)
            torch.cuda.set_device(self.device)  # events, streams, FSDP and DeepSpeed take the current one
        self.dtype = resolve_dtype(options.dtype, self.device)
        per_step = options.batch_size * options.accumulation_steps * dist_env.size
        total = options.max_steps * per_step if options.max_steps else max(round(options.epochs * len(self.train)), 1)
        self.schedule = Schedule(len(self.train), per_step, total, options.seed)
        self.total_steps = self.schedule.total_steps
        self.warmup_steps = min(options.warmup_iters, self.total_steps // 10)
        self.folder: Path = options.out_dir / f"{run.name}.resume"
        self.steps_done = self.tokens_done = 0
        self.metrics: dict[str, float] = {}
        self.best_loss = math.inf  # the lowest that was logged
        self.resumed_loss: float | None = None  # of the state to resume; None once the first step was compared with it
        self.loader = self.make_loader(
            self.train, self.schedule, dist_env.rank, dist_env.size, options.batch_size, options.num_workers
        )
        self.log = RankLog(options.out_dir, run.name, dist_env)
        self.timer = StepTimer(self.device)
        trace = options.out_dir / f"{run.name}.rank{dist_env.rank}.trace.json"
        self.profiler = make_profiler(options.profile, trace, dist_env, self.device) if options.profile else None
        self._saved_step = 0  # of this run's newest state

    # ---- one step -------------------------------------------------------------------------------------------------

    def step(self, step: int, micro_batches: list[Batch], error: BaseException | None = None) -> dict[str, float]:
        """Do one optimizer step with this process's part of the samples; return sums over the whole step.

        error: why this process could not prepare its part.
        """
        lr = get_lr(step, self.total_steps, self.options.learning_rate, self.warmup_steps)
        self.strategy.set_learning_rate(lr)
        self.dist_env.heartbeat(f"step {step + 1}")
        # Count first: gradients are divided by the targets of the whole step, not of a micro-batch or a process.
        counts = [sum(getattr(batch, name) for batch in micro_batches if not batch.dummy) for name in COUNTS]
        *counts, n_failed = all_reduce_sum(self.dist_env, [*counts, error is not None], self.device)
        n_targets, n_tokens, attention_pairs = counts
        if n_failed:
            self._stop_on_lost_data(step, error)
        if not n_targets:
            raise UserError(f"step {step + 1}: its samples have no target token; was the data changed while training?")

        while (sums := self._accumulate(step, micro_batches, n_targets)) is None:
            micro_batches = self._shrink_micro_batch(step)

        summed = all_reduce_sum(self.dist_env, [float(value) for value in sums.values()], self.device)
        result = dict(zip(sums, summed, strict=True)) | {"lr": lr}
        if not all(math.isfinite(value) for value in summed):
            self._stop_on_non_finite(step, result)
        self._compare_with_state(step, result["loss"] / n_targets)
        norm = self.strategy.step(self.options.grad_clip or math.inf)  # does nothing if the norm is not finite
        skipped = not math.isfinite(norm)
        if skipped and not self.strategy.may_skip_step():
            self._stop_on_non_finite(step, result | {"grad_norm": norm})
        result |= {"skipped_steps": float(skipped), "grad_norm": 0.0 if skipped else norm}
        return result | {"n_targets": n_targets, "n_tokens": n_tokens, "attention_pairs": attention_pairs}

    def _accumulate(self, step: int, batches: list[Batch], n_targets: float) -> dict[str, Tensor] | None:
        """Do forward and backward of every micro-batch; gradients add up in the parameters. Return sums to log.

        None: with --auto_batch, the memory of this process or of another was not enough; gradients are empty again.
        """
        torch.manual_seed(derive_seed(self.options.seed, step, self.dist_env.rank))  # dropout: no state has to be saved
        sums: dict[str, Tensor] = {}
        out_of_memory = False
        # A process that ran out of memory cannot take part in the sum of gradients: with --auto_batch it comes later.
        separate_sum = self.options.auto_batch and self.dist_env.size > 1
        try:
            with self.timer.computing():
                for i, batch in enumerate(batches):
                    with self.strategy.accumulate(last=i + 1 == len(batches) and not separate_sum):
                        loss_sum, extras = self._forward(batch)
                        weight = 0.0 if batch.dummy else 1 / n_targets
                        self.strategy.backward(loss_sum * weight)
                    for name, value in extras.items():
                        value = torch.zeros_like(value) if batch.dummy else value
                        sums[name] = sums[name] + value if name in sums else value
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if not self.options.auto_batch:
                raise UserError(f"step {step + 1}: {self._memory_advice(error, self.loader.micro_batch)}") from error
            out_of_memory = True
            self.log.write(f"step {step + 1}: out of memory with micro-batches of {self.loader.micro_batch}: {error}")
        # After the except block, not in it: there the error still references all that was computed.
        if self.options.auto_batch and all_reduce_sum(self.dist_env, [out_of_memory], self.device)[0]:
            self.strategy.zero_grad()
            return None
        if separate_sum:
            self._sum_gradients()
        return sums

    def _sum_gradients(self) -> None:
        """Sum the gradients of all processes in a pass over one row that counts for nothing."""
        with self.strategy.accumulate(last=True):
            loss_sum, _ = self._forward(self.train.batch([0]))
            self.strategy.backward(loss_sum * 0.0)

    def _compare_with_state(self, step: int, loss: float) -> None:
        """Stop if the first step after resuming shows that the state is not what the run had when it saved it."""
        before, self.resumed_loss = self.resumed_loss, None
        if before is not None and has_exploded(loss, before):
            raise UserError(
                f"step {step + 1}: the loss is {loss:.4g}, but it was {before:.4g} when the state was saved: the state or "
                f"the data is not what it was. Nothing was changed; resume from another state in {self.folder}"
            )

    def _shrink_micro_batch(self, step: int) -> list[Batch]:
        """Halve the micro-batches, for the rest of the run; return the samples of this step in such batches."""
        before = self.loader.micro_batch
        if before == 1:
            raise UserError(f"step {step + 1}: {self._memory_advice(None, before)}")
        now = self.loader.micro_batch = -(-before // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the cached blocks have the wrong sizes
        rows = self.options.batch_size * self.options.accumulation_steps
        print(
            f"step {step + 1}: out of memory with {before} rows at once. --auto_batch continues with {now} rows and "
            f"{-(-rows // now)} accumulation steps: each step keeps its samples"
        )
        return self.loader.batches(step)

    def _memory_advice(self, error: RuntimeError | None, rows: int) -> str:
        reason = f" ({first_line(error)})" if error is not None else ""
        advice = "a shorter --max_seq_len, a smaller model"
        if rows > 1:
            advice = "a smaller --batch_size with more --accumulation_steps (the result is the same)"
            advice = advice if self.options.auto_batch else f"--auto_batch, {advice}"
        return f"out of memory with {rows} rows of data at once{reason}: use {advice} or --gradient_checkpointing"

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        phase = "step" if torch.is_grad_enabled() else "validation after step"
        # With --auto_batch a process may end a step early, when it is out of memory.
        self.dist_env.heartbeat(f"{phase} {self.steps_done + 1}, a batch", count=not self.options.auto_batch)
        batch = batch.to(self.device)
        if self.options.compile and "cu_seqlens" in batch.inputs:
            # The number of documents differs from batch to batch: one graph for all of them.
            torch._dynamo.maybe_mark_dynamic(batch.inputs["cu_seqlens"], 0)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss_sum, n_targets, extras = self.loss_fn(self.strategy.module, batch)
        if n_targets != batch.n_targets:
            raise AssertionError(f"the loss summed over {n_targets} targets, the batch has {batch.n_targets}")
        return loss_sum, extras

    def _stop_on_non_finite(self, step: int, result: dict[str, float]) -> None:
        samples = self.schedule.samples(step)
        report = self.options.out_dir / f"{self.run.name}.non_finite.json"
        self.save(weights=False)  # of before this step
        if self.dist_env.is_main:
            metrics = {name: str(value) for name, value in result.items()}
            documents = self.train.documents(samples)
            write_json(report, {"step": step + 1, "metrics": metrics, "samples": samples, "documents": documents})
        bad = ", ".join(f"{name} is {value}" for name, value in result.items() if not math.isfinite(value))
        raise UserError(
            f"step {step + 1}: {bad}; stopped before the weights changed. {self._kept()} The numbers of the samples and "
            f"documents are in {report}. Try a lower --learning_rate, more --warmup_iters or "
            "--dtype float32, and look at those documents"
        )

    def _stop_on_lost_data(self, step: int, error: BaseException | None) -> None:
        """Stop every process when one cannot read its data; all raise the same error."""
        text = None
        if error is not None:
            where = self._bad_samples(step)
            if isinstance(error, RuntimeError) and is_out_of_memory(error):  # while the model wrote its answers
                smaller = (
                    "--batch_size with more --accumulation_steps" if self.loader.micro_batch > 1 else "--max_new_tokens"
                )
                reason = f"out of memory ({first_line(error)}): use a smaller {smaller}"
            elif isinstance(error, UserError):
                reason = str(error)
            else:
                where = where or "every sample of the step can be read now"
                reason = f"{type(error).__name__}: {error}"
            who = f"on rank {self.dist_env.rank}" if self.dist_env.size > 1 else ""
            place = " ".join(part for part in (where, who) if part)
            text = f"{place}: {reason}" if place else reason
            text += f" (see {self.log.path})"
        self.save(weights=False)  # of before this step
        reasons = "; ".join(text for text in all_gather_object(self.dist_env, text) if text)
        files = f" Its files: {', '.join(map(str, self.options.data_path))}." if self.options.data_path else ""
        raise UserError(
            f"step {step + 1}: no batch could be made: {reasons}. {self._kept()}{files} Fix the cause, then continue "
            "with --resume auto"
        ) from error

    def _kept(self) -> str:
        return f"The state is saved in {self.folder}." if self.steps_done else "Nothing was trained yet."

    def _bad_samples(self, step: int) -> str:
        """Return which sample of this process cannot be read; "" if all of them can."""
        mine = self.schedule.samples(step)[self.dist_env.rank :: self.dist_env.size]
        with ThreadPoolExecutor(1) as pool:  # catches any error
            bad = [i for i in mine if pool.submit(self.train.batch, [i]).exception() is not None]
        if not bad:
            return ""
        return f"sample {bad[0]} (documents {', '.join(map(str, self.train.documents(bad[:1])))})"

    # ---- the run --------------------------------------------------------------------------------------------------

    def prepare(self, before_training: Callable[[nn.Module], None] | None = None) -> None:
        """Load the state and set up everything that can fail, before the first step."""
        options = self.options
        options.out_dir.mkdir(parents=True, exist_ok=True)
        identity, settings = self.identity(), self.settings()
        assert_same_on_all_ranks(self.dist_env, identity | _shared_flags(options))
        state = broadcast_object(
            self.dist_env, lambda: find_state(self.folder, options, self.dist_env, identity, settings)
        )
        if options.gradient_checkpointing:
            # The re-entrant kind gives a frozen model with adapters no gradient at all.
            self.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        # Counted before they are sharded. Frozen ones need fewer FLOPs: then there is no MFU.
        frozen = any(not parameter.requires_grad for parameter in self.model.parameters())
        active_parameters = None if frozen else parameter_counts(self.model)["active"]  # type: ignore[arg-type]
        self.strategy = make_strategy(self.model, options, self.dist_env, self.device, self.dtype, state)
        if before_training is not None:
            before_training(self.strategy.module)
        if state is not None:
            self._resume(state)
        self.metrics_logger = MetricsLogger(
            options, self.run.name, self.dist_env, self.run.config, active_parameters, self.device, self.dtype,
            self.total_steps, self.steps_done, self.timer, self.log,
        )  # fmt: skip
        if self.val is not None and self.steps_done < self.total_steps:
            # A broken validation fails now, not after an hour. How many rows fit is not known yet with --auto_batch; but
            # what is compiled should see as many as later.
            self._validate(self.val, max_batches=2, rows=1 if options.auto_batch and not options.compile else None)
        if self.dist_env.size > 1 and isinstance(self.strategy, DDPStrategy) and not options.compile:
            # DDP arranges its buckets in its first backward pass. It should not be one that counts: a restarted run
            # would add up the gradients of its first step in another order than a run that was not interrupted.
            self.strategy.train(False)
            self._sum_gradients()
            self.strategy.zero_grad()

    def run_steps(self, received: list[int]) -> dict[str, float]:
        """Do all steps that are left, or until a signal was received."""
        options, logger = self.options, self.metrics_logger
        self.strategy.train(True)
        first = self.steps_done
        if first == self.total_steps:
            self._save_weights()  # a run that was killed after its last state may lack them
        prefetched = self.loader.prefetch(first)
        for step in range(first, self.total_steps):
            with self.timer.waiting_for_data():
                batches, error = next(prefetched)
            result = self.step(step, batches, error)
            self.steps_done = done = step + 1
            self.tokens_done += int(result["n_tokens"])
            logger.add(done, result)
            if self.profiler is not None:
                with logger.pause():  # to write the trace takes seconds
                    self.profiler.step()
            last = done == self.total_steps
            val = self.val if last or done % options.val_interval == 0 else None
            if val is not None:
                with logger.pause():
                    logger.add_validation(self._validate(val))
            if last or val is not None or done % options.log_interval == 0 or step == first:
                self.metrics = logger.log(done, self.tokens_done)
                self.best_loss = min(self.best_loss, self.metrics["loss"])
            if options.sample_interval and (last or done % options.sample_interval == 0):
                with logger.pause():
                    self._sample()
            asked_to_stop = all_reduce_sum(self.dist_env, [len(received)], self.device)[0]
            may_stop = self.loader.resumable(done)
            if last or (may_stop and (asked_to_stop or done % options.save_interval == 0)):
                with logger.pause():
                    self.save()
            if asked_to_stop and may_stop and not last:
                logger.close()
                print(f"stopped after step {done}/{self.total_steps}; the state is saved: continue with --resume")
                raise SystemExit(128 + (received or [signal.SIGTERM])[0])
        return self.metrics

    @torch.no_grad()
    def _validate(self, val: Dataset, max_batches: int | None = None, rows: int | None = None) -> dict[str, float]:
        """Return means over the validation set (of all processes): "loss" and what else the loss function logs.

        rows: those in a batch; None: as many as in a micro-batch of training.
        """
        was_training = self.strategy.module.training
        self.strategy.train(False)
        sums: dict[str, float] = {}
        n_targets = 0
        rows = rows or self.loader.micro_batch
        batches = self.loader.shard(val, [*range(len(val))], rows)
        try:
            for batch in itertools.islice(batches, max_batches):
                _, extras = self._forward(batch)
                n_targets += 0 if batch.dummy else batch.n_targets
                for name, value in extras.items():
                    sums[name] = sums.get(name, 0.0) + (0.0 if batch.dummy else float(value))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            advice = self._memory_advice(error, rows)
            raise UserError(f"validation after step {self.steps_done}: {advice}") from error
        self.strategy.train(was_training)
        *values, total = all_reduce_sum(self.dist_env, [*sums.values(), n_targets], self.device)
        means = means_of(dict(zip(sums, values, strict=True)), total)
        if not all(math.isfinite(value) for value in means.values()):
            raise UserError(
                f"validation after step {self.steps_done}: {means} is not finite; the training state is kept"
            )
        n_bytes = getattr(val, "n_bytes", 0)
        if max_batches is None and n_bytes and "loss" in means:
            means["bits_per_byte"] = means["loss"] * total / math.log(2) / n_bytes
        return means

    def _sample(self) -> None:
        """Let the model write texts from fixed prompts, on rank 0; the others wait for it in the next step."""
        if self.dist_env.is_main and self.run.sample is not None:
            self.strategy.train(False)
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
                samples = self.run.sample(self.model)
            self.strategy.train(True)
            self.metrics_logger.add_samples(self.steps_done, samples)

    # ---- saving and resuming --------------------------------------------------------------------------------------

    def identity(self) -> dict:
        """Return what must not change between a stop and a resume."""
        return {
            "stage": self.run.stage,
            "config": self.run.config.own_fields(),
            "train_data": self.train.fingerprint,
            "val_data": self.val.fingerprint if self.val is not None else None,
            **self.run.identity,
            "seed": self.options.seed,
            "samples_per_step": self.schedule.per_step,
            "optimizer": self.options.optimizer,
        }

    def settings(self) -> dict:
        """Return what may change; then the result differs from that of an uninterrupted run."""
        names = ["learning_rate", "embedding_lr_scale", "warmup_iters", "weight_decay", "grad_clip", "dtype"]
        return {name: getattr(self.options, name) for name in names} | {
            "total_steps": self.total_steps,
            "world_size": self.dist_env.size,
        }

    def save(self, weights: bool = True) -> None:
        """Save the training state, and the weights for later stages. Every process has to call it."""
        if self._saved_step == self.steps_done:
            return
        bad = [name for names in all_gather_object(self.dist_env, self.strategy.non_finite()) for name in names]
        if bad:
            raise UserError(f"step {self.steps_done}: {bad[0]} is not finite ({len(bad)} tensors); nothing was saved")
        run = {
            "identity": self.identity(), "settings": self.settings(), "options": self.options.describe(),
            "format": self.strategy.format, "run_id": self.dist_env.run_id,
            "finished": self.steps_done == self.total_steps,
            "tokens": self.tokens_done, "metrics": self.metrics, "micro_batch": self.loader.micro_batch,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
        }  # fmt: skip
        save_state(
            self.folder, self.steps_done, self.strategy.save, run, self.dist_env, self.options.keep, self._saved_step
        )
        self._saved_step = self.steps_done
        if self.dist_env.is_main:
            self.metrics_logger.forget_old_lines()
        if weights:
            self._save_weights()
        barrier(self.dist_env)

    def _save_weights(self) -> None:
        """Write the weights for later stages, unless the loss has exploded since better ones were written."""
        loss = self.metrics.get("loss", self.best_loss)
        # The loss of a policy goes with its rewards: it may rise while they do.
        if "reward" not in self.metrics and has_exploded(loss, self.best_loss):
            message = (
                f"the loss is {loss:.4g} after step {self.steps_done}, and was {self.best_loss:.4g} before: the weights "
                f"of {self.run.name} for later stages stay those of the last good save"
            )
            if self.steps_done == self.total_steps:
                raise UserError(f"{message}. Try a lower --learning_rate or --grad_clip")
            print(f"WARNING: {message}")
            return
        tensors = self.strategy.full_parameters()
        if self.dist_env.is_main:
            info = {
                "stage": self.run.stage, "step": self.steps_done, "total_steps": self.total_steps,
                "tokens": self.tokens_done, "loss": self.metrics.get("loss"), "metrics": self.metrics,
                **self.run.identity, "train_data": self.train.fingerprint, "options": self.options.describe(),
            }  # fmt: skip
            self.run.save_weights(info, tensors)
            self.metrics_logger.report(info, last=self.steps_done == self.total_steps)
        deque(tensors, maxlen=0)  # sharded parameters are gathered by all processes together

    def _resume(self, state: TrainingCheckpoint) -> None:
        """Continue from `state`: weights, optimizer, counters."""
        if not all(all_gather_object(self.dist_env, state.path.is_dir())):
            raise UserError(
                f"not every machine sees {state.path}: all of them need the same --out_dir, or a copy of it"
            )
        self.strategy.load(state.path)
        self.steps_done = self._saved_step = state.step
        self.tokens_done, self.metrics = state.run["tokens"], state.run["metrics"]
        self.best_loss = state.run["best_loss"] if state.run["best_loss"] is not None else math.inf
        self.resumed_loss = None if "reward" in self.metrics else self.metrics.get("loss")
        if self.options.auto_batch:  # more did not fit into the memory
            self.loader.micro_batch = min(self.loader.micro_batch, state.run["micro_batch"])


def has_exploded(loss: float, before: float) -> bool:
    """Return whether a loss is so much higher than before that something is broken.

    Losses that are not nats per token (IPO starts at 25 or more) may double.
    """
    return loss > before + max(EXPLODED, before)


def _shared_flags(options: TrainOptions) -> dict:
    """Return the flags that have to be the same in all processes: all except paths and devices of a machine."""
    local = "data_path out_dir cache_dir tokenizer init_from vision_encoder local_rank resume device compare".split()
    return {f"--{name}": value for name, value in options.describe().items() if name not in local}
