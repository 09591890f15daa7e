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
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import torch

from model.LMConfig import PRESETS, LMConfig, preset
from model.rope import parse_scaling
from model.tokenizer import TOKENIZER_DIR
from trainer.optim import OPTIMIZERS
from trainer.zero_config import zero_problems

from .parser import Parser, write_problems

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Fields of LMConfig that are decided by the toolkit, not by a flag.
_NOT_FLAGS = {"use_cache", "tie_word_embeddings", "unk_token_id", "bos_token_id", "eos_token_id", "pad_token_id"}


def flag(default, help: str, **settings):
    """A dataclass field that becomes a flag; `settings` go to `ArgumentParser.add_argument`."""
    metadata = {"help": help, "settings": settings}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class TrainOptions:
    """Flags of every training stage."""

    data_path: list[Path] = flag([], "training files: CSV, JSONL, JSON, Parquet, TXT (.gz, .zst too)", nargs="+")
    out_dir: Path = flag(ROOT / "out", "folder for checkpoints, metrics and plots (default: out)")
    cache_dir: Path | None = flag(None, "folder for tokenised data (default: OUT_DIR/cache)")
    tokenizer: Path = flag(TOKENIZER_DIR, "tokenizer folder (default: the one shipped in model/)")
    preset: str | None = flag(None, "model size (default: minimind-v1-small)", choices=[*PRESETS])
    model: dict = dataclasses.field(default_factory=dict)  # LMConfig fields given as flags

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

    def problems(self) -> list[str]:
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
        found += write_problems("--out_dir", self.out_dir)
        found += write_problems("--cache_dir", self.cache_dir) if self.cache_dir is not None else []
        try:
            self.config()
        except ValueError as error:
            found.append(str(error))
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
            found += zero_problems(self.deepspeed, self, dtype)
        return found

    def config(self) -> LMConfig:
        """The model asked for by --preset and single fields."""
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


Options = typing.TypeVar("Options", bound=TrainOptions)


def parse_options(options: type[Options], description: str, argv: list[str] | None = None) -> Options:
    """Read the command line into a dataclass of flags; exit with all that is wrong at once.

    A stage that does not want a shared flag has none of it: it overrides the field with `dataclasses.field(init=False)`.
    """
    parser = Parser(description=description)
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if "help" in field.metadata:
            _add(parser, field.name, hints[field.name], _default(field), **field.metadata)
    if "model" in hints:
        group = parser.add_argument_group("model", "fields of the configuration; default: what the preset says")
        # Only our fields: the annotations of the base class name things that exist nowhere at run time.
        own = types.SimpleNamespace(__annotations__=LMConfig.__annotations__)
        for name, kind in typing.get_type_hints(own).items():
            if name not in _NOT_FLAGS:
                _add(group, name, kind, None, _model_help(name), {})
    given = vars(parser.parse_args(argv))
    own = {field.name for field in dataclasses.fields(options)}
    model = {name: value for name, value in given.items() if name not in own and value is not None}
    result = options(**{name: value for name, value in given.items() if name in own}, model=model)
    problems = result.problems()
    if problems:
        parser.refuse(problems)
    return result


def _add(parser, name: str, kind, default, help: str, settings: dict) -> None:
    kind = _inner(kind)
    if kind is bool:
        settings = {"action": argparse.BooleanOptionalAction} | settings
    elif kind is dict:  # rope_scaling
        settings = {"type": _scaling, "metavar": "METHOD:FACTOR"} | settings
    else:
        settings = {"type": kind} | settings
    if default is not None and "(default" not in help and kind is not bool and default != []:
        help += f" (default: {default})"
    parser.add_argument(f"--{name}", default=default, help=help.replace("%", "%%"), **settings)


def _scaling(text: str) -> dict:
    """`yarn:4` as LMConfig has it."""
    try:
        method, factor = parse_scaling(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if factor is None:
        raise argparse.ArgumentTypeError(f"--rope_scaling {text} needs a factor: {method}:4")
    return {"rope_type": method, "factor": factor}


def _inner(kind):
    """`int | None` -> int, `list[Path]` -> Path."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind


def _default(field: dataclasses.Field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _model_help(name: str) -> str:
    """What the docstring of LMConfig says about a field: said once, there."""
    lines = (LMConfig.__doc__ or "").splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(f"{name}:")), None)
    if start is None:
        return ""
    words = [lines[start].split(":", 1)[1].strip()]
    for line in lines[start + 1 :]:
        if not line.startswith(" " * 12):
            break
        words.append(line.strip())
    return " ".join(words)


def resolve_device(name: str) -> torch.device:
    """The device called `name`; auto: the first of CUDA, MPS, CPU that is there. ValueError if it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is not a device; use cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this PyTorch ({torch.__version__}) sees no CUDA device; use --device cpu")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices, from cuda:0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: there is none here; use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name} is not supported; use cpu, cuda, cuda:N or mps")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The computation's precision; auto: bfloat16 where the hardware multiplies it fast."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if ampere else torch.float16
    if device.type == "cpu" and _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it (AVX512-BF16 or AMX); elsewhere bfloat16 is emulated and slow."""
    if sys.platform != "linux":
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
