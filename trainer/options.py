"""The flags that all training stages share, declared once.

A stage's options are a dataclass: a field is a flag, its default the flag's default. A stage adds its own fields:

    @dataclass
    class PretrainOptions(TrainOptions):
        text_field: str = flag("text", "column or key with the text")

    options = parse_options(PretrainOptions, __doc__)
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import flag, flag_group, validate_folder
from common.files import ROOT
from model.architecture import PRESETS, TOKENIZER_DIR, Architecture, field_descriptions, parse_rope_scaling

if TYPE_CHECKING:
    import torch

    from model.LMConfig import LMConfig

OPTIMIZERS = ("adamw", "muon")
DTYPES = ("bfloat16", "float16", "float32")


def _model_flags() -> dict[str, tuple[Any, str]]:
    """Return a flag for every field of the model: name -> (type, help)."""
    kinds, help = typing.get_type_hints(Architecture), field_descriptions()
    return {name: (_scaling if name == "rope_scaling" else kind, help[name]) for name, kind in kinds.items()}


def _scaling(text: str) -> dict:
    """Read METHOD:FACTOR, such as yarn:4, as LMConfig has it."""
    try:
        method, factor = parse_rope_scaling(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if factor is None:
        raise argparse.ArgumentTypeError(f"--rope_scaling {text} needs a factor: {method}:4")
    return {"rope_type": method, "factor": factor}


@dataclass
class TrainOptions:
    """Flags of every training stage."""

    data_path: list[Path] = flag([], "training files: CSV, JSONL, JSON, Parquet, TXT (.gz, .zst too)", nargs="+")
    out_dir: Path = flag(ROOT / "out", "folder for checkpoints, metrics and plots (default: out)")
    cache_dir: Path | None = flag(None, "folder for tokenised data (default: OUT_DIR/cache)")
    tokenizer: Path = flag(TOKENIZER_DIR, "tokenizer folder (default: the one shipped in model/)")
    preset: str | None = flag(None, "model size (default: minimind-v1-small)", choices=[*PRESETS])
    model: dict = flag_group("model", "fields of the configuration; default: what the preset says", _model_flags)

    epochs: float = flag(1.0, "passes over the data; may be a fraction")
    max_steps: int | None = flag(None, "end after so many optimizer steps instead of after --epochs")
    batch_size: int = flag(32, "rows of max_seq_len tokens that go through the model at once, per process")
    accumulation_steps: int = flag(1, "micro-batches whose gradients are added up for one optimizer step")
    auto_batch: bool = flag(
        False, "when the device runs out of memory, halve the rows that go through the model at once and double the "
        "accumulation, as often as it takes; the samples of a step stay the same",
    )  # fmt: skip
    learning_rate: float = flag(1e-3, "peak learning rate")
    warmup_iters: int = flag(50, "optimizer steps of linear warm-up (at most a tenth of the run)")
    weight_decay: float = flag(0.1, "decay of matrices; norms and embeddings never decay")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 for no limit")
    optimizer: str = flag("adamw", "adamw, or muon for the matrices and AdamW for the rest", choices=OPTIMIZERS)
    seed: int = flag(1337, "of initial weights, data order and dropout")

    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = flag(
        "auto", "precision of the computation; auto: bfloat16 where the hardware has it, else float16 on CUDA and "
        "float32 elsewhere", choices=["auto", *DTYPES],
    )  # fmt: skip
    compile: bool = flag(False, "compile the model: slower start, faster steps (needs a C++ compiler on a CPU)")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, slower")
    num_workers: int = flag(1, "threads that prepare the next batches; 0: prepare each when it is needed")
    local_rank: int = flag(0, "set by launchers; the environment variable LOCAL_RANK counts")
    deepspeed: Path | None = flag(
        None, "spread optimizer, gradients or weights over the processes with DeepSpeed, as this file says (configs/)",
        metavar="FILE",
    )  # fmt: skip
    fsdp: bool = flag(False, "spread weights, gradients and optimizer over the processes with PyTorch's FSDP2")
    timeout: float = flag(600.0, "seconds that processes wait for one that does not come before they give up")

    val_fraction: float = flag(0.01, "share of the documents held out for validation, chosen by content; 0: none")
    val_tokens: int = flag(100_000, "hold out no more than about so many tokens")
    val_interval: int = flag(200, "optimizer steps between validations (and after the last step)")
    log_interval: int = flag(10, "optimizer steps between log lines")
    save_interval: int = flag(200, "optimizer steps between saves of weights and training state")
    keep: int = flag(2, "training states to keep, the newest")
    save_dtype: str = flag(
        "float32", "precision of the .pth file (the training state is always float32)", choices=DTYPES
    )
    resume: str | None = flag(
        None, "continue a stopped run exactly: no value for the newest state of this model, a path for another one, "
        "auto to continue if there is a state and start if there is none", nargs="?", const="newest", metavar="auto|PATH",
    )  # fmt: skip
    overwrite: bool = flag(
        False, "replace a checkpoint of another architecture, or the state of a run that was not finished"
    )

    use_wandb: bool = flag(False, "log to Weights & Biases (without an account: offline, into OUT_DIR/wandb)")
    wandb_project: str = flag("MiniMind", "project name there")
    wandb_run_name: str | None = flag(None, "run name there (default: stage and size)")
    use_tensorboard: bool = flag(False, "log to TensorBoard, into OUT_DIR/tensorboard")
    profile: int = flag(
        0, "record so many optimizer steps, after a short warm-up, as a trace for chrome://tracing in OUT_DIR; 0: none",
        metavar="N",
    )  # fmt: skip

    def validate(self) -> list[str]:
        """Everything that is wrong with the flags, each in words that name the flag."""
        found = []
        for name in ("batch_size", "accumulation_steps", "val_interval", "log_interval", "save_interval"):
            if getattr(self, name) < 1:
                found.append(f"--{name} {getattr(self, name)} must be at least 1")
        for name in ("warmup_iters", "num_workers", "weight_decay", "grad_clip", "val_tokens", "profile"):
            if getattr(self, name) < 0:
                found.append(f"--{name} {getattr(self, name)} must not be negative")
        numbers = {name: getattr(self, name) for name in self.__dataclass_fields__} | self.model
        for name, value in numbers.items():
            if isinstance(value, float) and not math.isfinite(value):
                found.append(f"--{name} {value} is not a number to compute with")
        if not 0 <= self.seed < 2**63:
            found.append(f"--seed {self.seed} must be at least 0 and below 2**63")
        if self.model.get("max_seq_len", 2) < 2:
            found.append(f"--max_seq_len {self.model['max_seq_len']}: a row of one token has nothing to predict")
        if self.max_steps is not None and self.max_steps < 1:
            found.append(f"--max_steps {self.max_steps} must be at least 1")
        if not self.epochs > 0:
            found.append(f"--epochs {self.epochs} must be more than 0")
        if not self.learning_rate > 0:
            found.append(f"--learning_rate {self.learning_rate} must be more than 0")
        if not 0 <= self.val_fraction < 1:
            found.append(f"--val_fraction {self.val_fraction} must be at least 0 and below 1")
        if self.keep < 2:
            found.append(f"--keep {self.keep} must be at least 2: one state may be in the making when power fails")
        if self.resume is not None and self.overwrite:
            found.append("--resume continues a run and --overwrite replaces it: give one of them")
        found += validate_folder("--out_dir", self.out_dir)
        found += validate_folder("--cache_dir", self.cache_dir) if self.cache_dir is not None else []
        try:
            self.config()
        except ValueError as error:
            found.append(str(error))
        from model.device import resolve_device, resolve_dtype  # loads torch

        try:
            device = resolve_device(self.device)
            dtype = str(resolve_dtype(self.dtype, device)).removeprefix("torch.")
            found += self._spreading_problems(device, dtype)
        except ValueError as error:
            found.append(str(error))
        return found

    def _spreading_problems(self, device: torch.device, dtype: str) -> list[str]:
        found = []
        if not self.timeout >= 1:
            found.append(f"--timeout {self.timeout} must be at least 1 second")
        if self.fsdp and self.deepspeed is not None:
            found.append("--fsdp and --deepspeed are two ways to do the same: give one of them")
        if self.fsdp and dtype == "float16":
            found.append("--fsdp with --dtype float16 is not supported: use bfloat16 or float32, or leave --fsdp out")
        if self.fsdp and self.optimizer != "adamw":
            found.append(f"--optimizer {self.optimizer} needs whole matrices and --fsdp splits them: use adamw")
        if self.auto_batch and (self.fsdp or self.deepspeed is not None):
            found.append(
                "--auto_batch cannot repeat a step that --fsdp or --deepspeed broke off: leave it out, and use a smaller "
                "--batch_size with more --accumulation_steps"
            )
        for name in ("fsdp", "deepspeed"):
            if getattr(self, name) and device.type == "mps":
                found.append(f"--{name} needs CUDA devices or CPUs: leave it out")
        if self.deepspeed is not None:
            from trainer.parallel.zero_config import validate_zero_config

            found += validate_zero_config(self.deepspeed, self, dtype)
        return found

    def config(self) -> LMConfig:
        """Return the model that --preset and single fields ask for."""
        from model.LMConfig import preset  # loads transformers

        return preset(self.preset or "minimind-v1-small", **self.model)

    def describe(self) -> dict:
        """The resolved flags as JSON-friendly values."""
        plain = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = [str(item) for item in value]
            plain[field.name] = str(value) if isinstance(value, Path) else value
        return plain


@dataclass
class TuneOptions(TrainOptions):
    """Flags of the stages that start from a trained model."""

    init_from: str | None = flag(
        None, "weights to start from; none for random ones (default: the newest fitting checkpoint in OUT_DIR)",
        metavar="FILE|none",
    )  # fmt: skip
