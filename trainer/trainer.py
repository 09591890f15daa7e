"""The training loop: one for all stages.

A stage is data + loss + starting weights. `fit` does the rest: batches, precision, accumulation, clipping, schedule,
validation, logging, saving, resuming, stopping. "Step" always means optimizer step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import atomic_write, exclusive
from data_pipeline.datasets import Batch, Dataset
from data_pipeline.packing import sample_order
from model.device import resolve_device, resolve_dtype
from model.LMConfig import LMConfig
from trainer.checkpoint import TrainingCheckpoint, complete_states, delete_state, differences, load_state, save_state
from trainer.distributed import (
    DistEnv,
    all_reduce_sum,
    assert_same_on_all_ranks,
    barrier,
    broadcast_object,
    broadcast_parameters,
)
from trainer.losses import LossFunction
from trainer.metrics import MetricsLogger
from trainer.optim import get_lr
from trainer.options import TrainOptions
from trainer.parallel.state import load_parameters
from trainer.parallel.strategy import make_strategy
from trainer.profiler import Profiler
from trainer.rank_log import RankLog, StepTimer

COUNTS = ("n_targets", "n_tokens", "attention_pairs")  # of a batch, summed over a step


@dataclass(frozen=True)
class Run:
    """What is trained.

    Attributes:
        stage: "pretrain", "full_sft", ...
        name: how its files in --out_dir are called, such as "pretrain_512".
        config: of the model.
        identity: what has to be the same for a stopped run to go on: data, tokenizer, starting weights.
        save_weights: writes the result so far for use by later stages; given a description of how it was made.
        active_parameters: that a token passes through (for MFU); 0: unknown.
    """

    stage: str
    name: str
    config: LMConfig
    identity: dict
    save_weights: Callable[[dict], None]
    active_parameters: int = 0


@dataclass(frozen=True)
class Schedule:
    """Which samples belong to which step: a pure function of the seed, whatever was prefetched or interrupted.

    Sample g of the run is sample `sample_order(n_samples, seed, g // n_samples)[g % n_samples]` of the data set; step s
    takes the samples from s * per_step on; the last step of the run may have fewer.
    """

    n_samples: int
    per_step: int
    total_samples: int
    seed: int
    _orders: dict[int, np.ndarray] = field(default_factory=dict, compare=False)

    @property
    def total_steps(self) -> int:
        return math.ceil(self.total_samples / self.per_step)

    def samples(self, step: int) -> list[int]:
        """The data-set indices of one step, over all micro-batches and processes."""
        first = step * self.per_step
        return [self._sample(g) for g in range(first, min(first + self.per_step, self.total_samples))]

    def _sample(self, g: int) -> int:
        epoch, position = divmod(g, self.n_samples)
        if epoch not in self._orders:
            self._orders.pop(epoch - 2, None)
            self._orders[epoch] = sample_order(self.n_samples, self.seed, epoch)
        return int(self._orders[epoch][position])


def fit(
    model: nn.Module,
    loss_fn: LossFunction,
    train: Dataset,
    val: Dataset | None,
    options: TrainOptions,
    run: Run,
    dist_env: DistEnv,
) -> dict:
    """Train `model` in place as `options` say; returns the last metrics.

    Raises UserError if there is nothing to resume, what is resumed is another run, the loss becomes non-finite, or the
    disk is full; SystemExit (128 + signal) after a clean stop on SIGTERM or Ctrl-C.
    """
    trainer = Trainer(model, loss_fn, train, val, options, run, dist_env)
    with hold_run(options.out_dir, run.name) if dist_env.is_main else contextlib.nullcontext(), trainer.log:
        trainer.prepare()
        with stop_signals(speak=dist_env.is_main) as stop, trainer.tracker, trainer.profiler:
            return trainer.run_steps(stop)


class Trainer:
    """The state of a run. Read `step` first: it is one optimizer step, from batch to new weights."""

    def __init__(self, model, loss_fn, train, val, options, run, dist_env) -> None:
        self.model, self.loss_fn, self.options, self.run, self.dist_env = model, loss_fn, options, run, dist_env
        self.train, self.val = train, val
        self.device = resolve_device(options.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", dist_env.local_rank)
        self.dtype = resolve_dtype(options.dtype, self.device)
        per_step = options.batch_size * options.accumulation_steps * dist_env.size
        total = options.max_steps * per_step if options.max_steps else max(round(options.epochs * len(train)), 1)
        self.schedule = Schedule(len(train), per_step, total, options.seed)
        self.total_steps = self.schedule.total_steps
        self.folder: Path = options.out_dir / f"{run.name}.resume"
        self.steps_done = self.tokens_done = 0
        self.metrics: dict = {}
        self.micro_batch: int = options.batch_size  # rows that go through the model at once; --auto_batch lowers it
        self.log = RankLog(options.out_dir, run.name, dist_env)
        self.clock = StepTimer(self.device)
        self.profiler = Profiler(options.profile, options.out_dir, run.name, dist_env, self.device)
        self._saved_step = -1

    # ---- one step -------------------------------------------------------------------------------------------------

    def step(self, step: int, batches: list[Batch] | DataFailure) -> dict[str, float]:
        """One optimizer step on this process's share of the samples; returns sums over the whole step."""
        options = self.options
        lr = get_lr(step, self.total_steps, options.learning_rate, self.warmup_steps)
        self.engine.set_learning_rate(lr)
        self.dist_env.heartbeat(f"step {step + 1}")
        # Count first: gradients are divided by the targets of the whole step, not of a micro-batch or a process.
        failed = isinstance(batches, DataFailure)
        counted = [] if failed else [batch for batch in batches if not batch.dummy]
        counts = [sum(getattr(batch, name) for batch in counted) for name in COUNTS]
        n_targets, n_tokens, attention_pairs, n_failed = all_reduce_sum(self.dist_env, [*counts, failed], self.device)
        if n_failed:
            self._stop_on_lost_data(step, batches if failed else None)
        if not n_targets:
            raise UserError(f"step {step + 1}: its samples have no target token; was the data changed while training?")

        while (sums := self._accumulate(step, batches, n_targets)) is None:
            batches = self._shrink_micro_batch(step)

        summed = all_reduce_sum(self.dist_env, [float(value) for value in sums.values()], self.device)
        result = dict(zip(sums, summed, strict=True)) | {"lr": lr}
        if not all(math.isfinite(value) for value in summed):
            self._stop_on_non_finite(step, result)
        norm = self.engine.step(options.grad_clip or math.inf)  # does nothing if the norm is not finite
        skipped = not math.isfinite(norm)
        if skipped and not self.engine.may_skip_step():
            self._stop_on_non_finite(step, result | {"grad_norm": norm})
        result |= {"skipped_steps": float(skipped), "grad_norm": 0.0 if skipped else norm}
        return result | {"n_targets": n_targets, "n_tokens": n_tokens, "attention_pairs": attention_pairs}

    def _accumulate(self, step: int, batches: list[Batch], n_targets: float) -> dict[str, Tensor] | None:
        """Forward and backward of every micro-batch: gradients add up in the parameters; returns sums to log.

        None: with --auto_batch, the memory of this process or of another was not enough; gradients are empty again.
        """
        torch.manual_seed(hash_seed(self.options.seed, step, self.dist_env.rank))  # dropout: nothing of it needs saving
        sums: dict[str, Tensor] = {}
        short = False
        try:
            with self.clock.computing():
                for i, batch in enumerate(batches):
                    loss_sum, extras = self._forward(batch)
                    weight = 0.0 if batch.dummy else 1 / n_targets
                    self.engine.backward(loss_sum * weight, last=i + 1 == len(batches))
                    for name, value in extras.items():
                        sums[name] = sums.get(name, 0) + (torch.zeros_like(value) if batch.dummy else value)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if not self.options.auto_batch:
                raise UserError(f"step {step + 1}: {self._memory_words(error)}") from error
            short = True
            self.log.write(f"step {step + 1}: out of memory with micro-batches of {self.micro_batch}: {error}")
        # Behind the except block: there the error still holds all that was computed.
        if not self.options.auto_batch:
            return sums
        self.engine.finish_backward()  # the others wait for the sums, also for those of a process that ran out
        if not all_reduce_sum(self.dist_env, [short], self.device)[0]:
            return sums
        self.engine.discard()
        return None

    def _shrink_micro_batch(self, step: int) -> list[Batch]:
        """The samples of a step in micro-batches of half the size, which stays that of the run."""
        if self.micro_batch == 1:
            raise UserError(f"step {step + 1}: {self._memory_words(None)}")
        options, before = self.options, self.micro_batch
        self.micro_batch = -(-before // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the pieces left are of the wrong sizes
        rows = options.batch_size * options.accumulation_steps
        if self.dist_env.is_main:
            print(
                f"step {step + 1}: out of memory with {before} rows at once. --auto_batch goes on with {self.micro_batch} "
                f"rows and {-(-rows // self.micro_batch)} accumulation steps: each step keeps its samples"
            )
        return self._batches(step)

    def _memory_words(self, error: RuntimeError | None) -> str:
        reason = f" ({str(error).splitlines()[0]})" if error is not None else ""
        if self.micro_batch > 1:
            advice = "--auto_batch, a smaller --batch_size with more --accumulation_steps (the result is the same)"
        else:
            advice = "a shorter --max_seq_len, a smaller model"
        return (
            f"out of memory with {self.micro_batch} rows of data at once{reason}: use {advice} or "
            "--gradient_checkpointing"
        )

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.dist_env.heartbeat(
            f"{'step' if torch.is_grad_enabled() else 'validation after step'} {self.steps_done + 1}, a batch"
        )
        batch = batch.to(self.device)
        if self.options.compile and "cu_seqlens" in batch.inputs:
            # The number of documents differs from batch to batch: one graph for all of them.
            torch._dynamo.maybe_mark_dynamic(batch.inputs["cu_seqlens"], 0)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss_sum, n_targets, extras = self.loss_fn(self.engine.module, batch)
        if n_targets != batch.n_targets:
            raise AssertionError(f"the loss summed over {n_targets} targets, the batch has {batch.n_targets}")
        return loss_sum, extras

    def _stop_on_non_finite(self, step: int, result: dict[str, float]) -> None:
        samples = self.schedule.samples(step)
        report = self.options.out_dir / f"{self.run.name}.non_finite.json"
        self.save(weights=False)  # of before this step
        if self.dist_env.is_main:
            facts = {name: str(value) for name, value in result.items()}
            content = {
                "step": step + 1,
                "metrics": facts,
                "samples": samples,
                "documents": self.train.documents(samples),
            }
            with atomic_write(report) as file:
                json.dump(content, file, indent=2)
        bad = ", ".join(f"{name} is {value}" for name, value in result.items() if not math.isfinite(value))
        raise UserError(
            f"step {step + 1}: {bad}; stopped before the weights changed. The state is saved in {self.folder}, the "
            f"numbers of the samples and documents in {report}. Try a lower --learning_rate, more --warmup_iters or "
            "--dtype float32, and look at those documents"
        )

    def _stop_on_lost_data(self, step: int, failure: DataFailure | None) -> None:
        """Every process comes here when the data of one cannot be had; all end with the same words."""
        words = None
        if failure is not None:
            error = failure.error
            self.log.write("ERROR " + "".join(traceback.format_exception(error)).rstrip())
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            who = f" on rank {self.dist_env.rank}" if self.dist_env.size > 1 else ""
            words = f"{self._bad_samples(step)}{who}: {reason} (see {self.log.path})"
        self.save(weights=False)  # of before this step
        words = "; ".join(text for text in _all_gather_object(self.dist_env, words) if text)
        files = f" Its files: {', '.join(map(str, self.options.data_path))}." if self.options.data_path else ""
        raise UserError(
            f"step {step + 1}: the data could not be read: {words}. The state is saved in {self.folder}.{files} Mend what "
            "is wrong with the data, then go on with --resume"
        ) from (failure.error if failure is not None else None)

    def _bad_samples(self, step: int) -> str:
        """Which of the samples of this process cannot be read, in words."""
        mine = self.schedule.samples(step)[self.dist_env.rank :: self.dist_env.size]
        with ThreadPoolExecutor(1) as pool:  # whatever is raised there
            bad = [i for i in mine if pool.submit(self.train.batch, [i]).exception() is not None]
        if not bad:
            return f"one of the samples {', '.join(map(str, mine))}, though each alone can be read now"
        documents = self.train.documents(bad[:1])
        shown = ", ".join(map(str, documents[:8])) + (" ..." if len(documents) > 8 else "")
        return f"sample {bad[0]} (document{'s' if len(documents) > 1 else ''} {shown})"

    # ---- the run --------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Everything that can fail is tried here, before the first step: state, optimizer, validation."""
        options = self.options
        options.out_dir.mkdir(parents=True, exist_ok=True)
        assert_same_on_all_ranks(self.dist_env, self.identity() | _shared_flags(options))
        state = self._resume_or_start()
        broadcast_parameters(self.dist_env, self.model, self.device)
        if options.gradient_checkpointing:
            # The re-entrant kind gives a frozen model with adapters no gradient at all.
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.engine = make_strategy(self.model, options, self.dist_env, self.device, self.dtype)
        if state is not None:
            self.engine.restore(state.tensors["optimizer"], state.tensors["scaler"])
        self.warmup_steps = min(options.warmup_iters, self.total_steps // 10)
        if options.compile:
            self.engine.module.compile()
        self.tracker = MetricsLogger(self)
        if self.val is not None and self.steps_done < self.total_steps:
            self._validate(max_batches=2)  # a broken validation fails now, not after an hour

    def run_steps(self, stop: StopRequest) -> dict:
        """Step until the end, or until asked to stop."""
        options = self.options
        self.engine.train(True)
        first = self.steps_done
        if first == self.total_steps and self.dist_env.is_main:
            self.run.save_weights(self.info())  # a run killed between its last state and its weights lacks them
        for step, batches in self._prefetch(first):
            result = self.step(step, batches)
            self.steps_done = done = step + 1
            self.tokens_done += int(result["n_tokens"])
            self.tracker.add(result)
            self.profiler.step()
            last = done == self.total_steps
            if self.val is not None and (last or done % options.val_interval == 0):
                with self.tracker.pause():
                    self.tracker.validated(self._validate())
            if last or done % options.log_interval == 0 or step == first:
                self.metrics = self.tracker.log(done)
            asked_to_stop = all_reduce_sum(self.dist_env, [stop.signal], self.device)[0]
            if last or done % options.save_interval == 0 or asked_to_stop:
                with self.tracker.pause():
                    self.save()
            if asked_to_stop and not last:
                self.tracker.close()
                if self.dist_env.is_main:
                    print(f"stopped after step {done}/{self.total_steps}; the state is saved: continue with --resume")
                raise SystemExit(128 + int(stop.signal or signal.SIGTERM))
        return self.metrics

    def _prefetch(self, first: int) -> Iterator[tuple[int, list[Batch] | DataFailure]]:
        """The batches of every step from `first` on, prepared while earlier steps compute.

        A step whose batches could not be made comes as a DataFailure: all processes have to hear of it before they stop.
        """

        def prepare(step: int) -> tuple[int, list[Batch]]:
            size = self.micro_batch
            return size, self._batches(step, size)

        workers = self.options.num_workers
        waiting: deque[Future] = deque()
        with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="batches") as pool:
            ahead = iter(range(first, self.total_steps))
            for step in range(first, self.total_steps):
                while len(waiting) <= workers and (n := next(ahead, None)) is not None:
                    waiting.append(pool.submit(prepare, n))
                future = waiting.popleft()
                with self.clock.waiting_for_data():
                    error = future.exception()
                if error is not None:
                    yield step, DataFailure(error)
                    continue
                size, batches = future.result()
                yield step, batches if size == self.micro_batch else self._batches(step)

    def _batches(self, step: int, size: int | None = None) -> list[Batch]:
        """This process's share of the samples of a step, in micro-batches of `size` (default: the present one)."""
        return list(self._shard(self.train, self.schedule.samples(step), size or self.micro_batch))

    def _shard(self, data: Dataset, samples: list[int], micro_batch: int) -> Iterator[Batch]:
        """This process's part of the samples, in micro-batches: as many as every other process has.

        Where there are too few samples it repeats one in a batch that does not count, because parameters that are spread
        over the processes need all of them for every forward pass.
        """
        rank, size = self.dist_env.rank, self.dist_env.size
        mine = samples[rank::size]
        for begin in range(0, len(samples[::size]), micro_batch):
            some = mine[begin : begin + micro_batch]
            yield data.batch(some) if some else dataclasses.replace(data.batch(samples[:1]), dummy=True)

    @torch.no_grad()
    def _validate(self, max_batches: int | None = None) -> dict[str, float]:
        """Means over the validation set (of all processes): "loss" and what else the loss function logs."""
        was_training = self.engine.module.training
        self.engine.train(False)
        sums: dict[str, float] = {}
        n_targets = 0
        shares = self._shard(self.val, list(range(len(self.val))), self.micro_batch)
        for batch in itertools.islice(shares, max_batches):
            _, extras = self._forward(batch)
            n_targets += 0 if batch.dummy else batch.n_targets
            for name, value in extras.items():
                sums[name] = sums.get(name, 0.0) + (0.0 if batch.dummy else float(value))
        self.engine.train(was_training)
        *values, total = all_reduce_sum(self.dist_env, [*sums.values(), n_targets], self.device)
        means = {name: value / total for name, value in zip(sums, values, strict=True)}
        if not all(math.isfinite(value) for value in means.values()):
            raise UserError(
                f"validation after step {self.steps_done}: {means} is not finite; the training state is kept"
            )
        n_bytes = getattr(self.val, "n_bytes", 0)
        if max_batches is None and n_bytes and "loss" in means:
            means["bits_per_byte"] = means["loss"] * total / math.log(2) / n_bytes
        return means

    # ---- saving and resuming --------------------------------------------------------------------------------------

    def identity(self) -> dict:
        """What must not change between a stop and a resume."""
        options, run = self.options, self.run
        return {
            "stage": run.stage,
            "config": run.config.own_fields(),
            "train_data": self.train.fingerprint,
            "val_data": self.val.fingerprint if self.val is not None else None,
            **run.identity,
            "seed": options.seed,
            "samples_per_step": self.schedule.per_step,
            "optimizer": options.optimizer,
        }

    def settings(self) -> dict:
        """What may change, but makes the result differ from that of a run in one go."""
        names = ["learning_rate", "warmup_iters", "weight_decay", "grad_clip", "dtype"]
        return {name: getattr(self.options, name) for name in names} | {
            "total_steps": self.total_steps,
            "world_size": self.dist_env.size,
        }

    def save(self, weights: bool = True) -> None:
        """Save the training state, and the weights for use. Every process has to come."""
        if self._saved_step == self.steps_done:
            return
        snapshot = self.engine.gather()
        if self.dist_env.is_main:
            tensors = {
                "model": snapshot.weights,
                "optimizer": snapshot.optimizer,
                "scaler": snapshot.scaler,
                "tokens": self.tokens_done,
                "metrics": self.metrics,
                "micro_batch": self.micro_batch,
            }
            bad = [name for name, tensor in snapshot.weights.items() if not torch.isfinite(tensor).all()]
            if bad:
                raise UserError(
                    f"step {self.steps_done}: {bad[0]} is not finite ({len(bad)} tensors); nothing was saved"
                )
            finished = self.steps_done == self.total_steps
            run = {"identity": self.identity(), "settings": self.settings(), "finished": finished}
            run |= {"options": self.options.describe(), "launch": self.dist_env.run_id}
            save_state(self.folder, self.steps_done, tensors, run, self.options.keep)
            if weights:
                self.run.save_weights(self.info())
                self.tracker.plot()
        self._saved_step = self.steps_done
        barrier(self.dist_env)

    def info(self) -> dict:
        """How the weights were made: goes into the JSON beside them."""
        return {
            "stage": self.run.stage,
            "step": self.steps_done,
            "total_steps": self.total_steps,
            "tokens": self.tokens_done,
            "loss": self.metrics.get("loss"),
            "metrics": self.metrics,
            **self.run.identity,
            "train_data": self.train.fingerprint,
            "options": self.options.describe(),
        }

    def _resume_or_start(self) -> TrainingCheckpoint | None:
        """The state to go on from, with its weights put into the model; None at the start of a run.

        Rank 0 looks, and has the tensors; the others learn the numbers, so their machines need not see its files.
        """
        state: TrainingCheckpoint | None = None

        def numbers() -> tuple[int, int, dict, int] | None:
            nonlocal state
            state = self._state_to_resume()
            if state is None:
                return None
            saved = state.tensors
            return state.step, saved["tokens"], saved["metrics"], saved.get("micro_batch", self.micro_batch)

        found = broadcast_object(self.dist_env, numbers)
        if found is None:
            return None
        self.steps_done, self.tokens_done, self.metrics, micro_batch = found
        if self.options.auto_batch:  # what did not fit then does not fit now
            self.micro_batch = min(self.micro_batch, micro_batch)
        self._saved_step = self.steps_done
        return state or TrainingCheckpoint(self.folder, self.steps_done, {"optimizer": {}, "scaler": {}}, {})

    def _state_to_resume(self) -> TrainingCheckpoint | None:
        """What rank 0 finds: see `_resume_or_start`. It clears away the states that the new run replaces."""
        options = self.options
        found = complete_states(self.folder)
        ours = [path for path in found if self.dist_env.restart_count and _run_id_of(path) == self.dist_env.run_id]
        if self.dist_env.restart_count:
            where = f"going on from {ours[-1].name}" if ours else "nothing was saved yet, starting as the flags say"
            print(f"started again by the launcher (restart {self.dist_env.restart_count}): {where}")
        if not ours and (options.resume is None or (options.resume == "auto" and not found)):
            if found and not options.overwrite and not _finished(found[-1]):
                raise UserError(
                    f"{self.folder} holds a run that was stopped at step {int(found[-1].name[5:])}: continue it with "
                    "--resume, discard it with --overwrite, or choose another --out_dir"
                )
            if options.resume == "auto":
                print(f"nothing to resume in {self.folder}: starting from the beginning")
            for old in found:
                delete_state(old)
            return None
        path = self.folder if ours or options.resume in ("newest", "auto") else Path(options.resume)
        state = load_state(ours[-1] if ours else path)
        changed = differences(self.identity(), state.run["identity"])
        if changed:
            if any(line.startswith(("train_data", "val_data")) for line in changed):
                changed.append(_why_other_data(options.describe(), state.run.get("options", {})))
            raise UserError(f"cannot resume {state.path}, it is another run: {'; '.join(changed)}")
        lacking = [name for name in ("model", "optimizer", "scaler", "tokens", "metrics") if name not in state.tensors]
        if lacking:
            raise UserError(
                f'cannot resume {state.path}: an older version wrote it, and it lacks "{lacking[0]}"; end the run with '
                "that version, or begin again with --overwrite"
            )
        parameters = {name for name, p in self.model.named_parameters() if p.requires_grad}
        if state.tensors["model"].keys() != parameters:
            odd = sorted(state.tensors["model"].keys() ^ parameters)
            raise UserError(f"cannot resume {state.path}: its parameters are others ({', '.join(odd[:3])} ...)")
        load_parameters(self.model, state.tensors["model"])
        print(f"resuming after step {state.step} from {state.path}")
        later = [old for old in found if int(old.name[5:]) > state.step]
        for old in later if state.path.parent.resolve() == self.folder.resolve() else []:
            print(f"discarding {old.name}, which is later: this run goes another way from here")
            delete_state(old)
        changed = differences(self.settings(), state.run["settings"])
        if changed:
            print(f"note: changed since then, so the result is not that of one run: {'; '.join(changed)}")
        if state.step >= self.total_steps:
            print(f"the run is finished: {state.step} of {self.total_steps} steps are done")
        return state


@contextlib.contextmanager
def hold_run(out_dir: Path, name: str) -> Iterator[None]:
    """Be the only run called `name` in `out_dir` while in here; see `common.files.exclusive`."""
    busy = (
        f"another run is training {name} in {out_dir} right now (its process is named in "
        f"{out_dir / 'logs' / name}.rank0.log): stop it, wait for it, or choose another --out_dir"
    )
    with exclusive(out_dir, name, busy):
        yield


@dataclass(frozen=True)
class DataFailure:
    """Stands where the batches of a step should be: a data-loading thread raised this."""

    error: BaseException


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the system had no memory left for a tensor; only CUDA has an exception of its own for that."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


@dataclass
class StopRequest:
    """The signal that asked the run to stop; 0: none yet."""

    signal: int = 0


@contextlib.contextmanager
def stop_signals(speak: bool = True) -> Iterator[StopRequest]:
    """Turn SIGTERM and Ctrl-C into a request to stop after the current step; a second Ctrl-C stops at once."""
    request = StopRequest()

    def ask(number: int, _frame) -> None:
        if request.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = number
        if speak:  # os.write: print may be in the middle of a line of its own
            os.write(2, b"\nstopping after this step (Ctrl-C again: at once, back to the last saved state)\n")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def hash_seed(seed: int, step: int, rank: int) -> int:
    """One number from three, such that neighbouring steps and ranks have unrelated random streams."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _shared_flags(options: TrainOptions) -> dict:
    """The flags that have to be the same in all processes: all but the places on their machines."""
    places = {"data_path", "out_dir", "cache_dir", "tokenizer", "init_from", "local_rank", "resume", "device"}
    return {f"--{name}": value for name, value in options.describe().items() if name not in places}


def _run_id_of(path: Path) -> str | None:
    return _described(path).get("launch") or None


def _described(path: Path) -> dict:
    """The description of a state; {} if it is damaged."""
    try:
        content = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _all_gather_object(dist_env: DistEnv, value: object) -> list:
    """The `value` of every process, by rank."""
    if dist_env.size == 1:
        return [value]
    gathered: list = [None] * dist_env.size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def _why_other_data(now: dict, then: dict) -> str:
    """In flags, where they are the reason, why a run has other data than before."""
    names = ("data_path", "val_fraction", "val_tokens", "tokenizer", "text_field", "max_dropped", "seed", "model")
    flags = [f"--{name} {then[name]} -> {now[name]}" for name in names if name in then and then[name] != now.get(name)]
    if flags:
        return f"the data is another because of {', '.join(flags)}"
    return "no flag that chooses data was changed: the files of --data_path have another content than then"


def _finished(path: Path) -> bool:
    return bool(_described(path).get("finished"))  # damaged: not known to be finished, so not to be replaced unasked
