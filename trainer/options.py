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
import json
import os
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from common.cli import flag, flag_group, validate_folder
from common.errors import UserError
from common.files import ROOT, checksum
from evaluation.runs import read_metrics
from model.architecture import PRESETS, TOKENIZER_DIR, Architecture, field_descriptions, parse_rope_scaling

if TYPE_CHECKING:
    import torch

    from model.LMConfig import LMConfig

OPTIMIZERS = ("auto", "muon", "adamw")
DTYPES = ("bfloat16", "float16", "float32")
# Of reinforcement learning: see trainer/policy_losses.py.
ALGORITHMS = ("grpo", "dr_grpo", "dapo", "cispo", "rloo", "ppo")


def mix_flag() -> Any:
    """Return the flag --mix, for the stages whose samples are documents or dialogues of several files."""
    return flag(
        [], "share of each file of --data_path in the tokens, such as 0.8 0.2; an epoch is one pass over the first file "
        "(default: every file once)", nargs="+", metavar="SHARE",
    )  # fmt: skip


def _model_flags() -> dict[str, tuple[Any, str]]:
    """Return a flag for every field of the model: name -> (type, help)."""
    kinds, help = typing.get_type_hints(Architecture), field_descriptions()
    return {name: (_scaling if name == "rope_scaling" else kind, help[name]) for name, kind in kinds.items()}


def _scaling(text: str) -> dict:
    """Read METHOD:FACTOR, such as yarn:4, into the form of LMConfig."""
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

    stage: ClassVar[str]  # the names of a run's files start with it; it may hold names of flags in braces
    recipes: ClassVar[
        dict[str, dict[str, float]]
    ] = {}  # optimizer -> flags that depend on it, where they are not given

    data_path: list[Path] = flag([], "training files: CSV, JSONL, JSON, Parquet, TXT (.gz, .zst too)", nargs="+")
    mix: list[float] = dataclasses.field(init=False, default_factory=list)  # a flag of some stages: mix_flag
    out_dir: Path = flag(ROOT / "out", "folder for checkpoints, metrics and plots (default: out)")
    cache_dir: Path | None = flag(None, "folder for tokenised data (default: OUT_DIR/cache)")
    max_dropped: float = flag(
        0.01, "largest share of rows that cannot be used (unreadable, not valid, too long, not for this stage); they are "
        "never trained on, and more of them are an error", min=0, max=1,
    )  # fmt: skip
    tokenizer: Path = flag(TOKENIZER_DIR, "tokenizer folder (default: the one shipped in model/)")
    preset: str | None = flag(None, "model size (default: minimind-v1-small)", choices=[*PRESETS])
    model: dict = flag_group("model", "fields of the configuration; default: what the preset says", _model_flags)

    epochs: float = flag(1.0, "passes over the data; may be a fraction", above=0)
    max_steps: int | None = flag(None, "stop after this many optimizer steps instead of after --epochs", min=1)
    batch_size: int = flag(32, "rows of max_seq_len tokens that go through the model at once, per process", min=1)
    accumulation_steps: int = flag(1, "micro-batches whose gradients are summed for one optimizer step", min=1)
    auto_batch: bool = flag(
        False, "when the device runs out of memory, halve the rows that go through the model at once and double the "
        "accumulation, as often as needed; the samples of a step stay the same",
    )  # fmt: skip
    learning_rate: float = flag(1e-3, "peak learning rate", above=0)
    embedding_lr_scale: float = flag(1.0, "learning rate of the embedding, relative to --learning_rate", above=0)
    warmup_iters: int = flag(50, "optimizer steps of linear warm-up (at most a tenth of the run)", min=0)
    weight_decay: float = flag(0.1, "weight decay of matrices; norms and embeddings never decay", min=0)
    grad_clip: float = flag(1.0, "maximum norm of the gradient; 0: no limit", min=0)
    optimizer: str = flag(
        "adamw", "muon: Muon for the matrices and AdamW for the rest; adamw: AdamW for all; auto: muon, but adamw with "
        "--deepspeed", choices=OPTIMIZERS,
    )  # fmt: skip
    seed: int = flag(1337, "seed of initial weights, data order and dropout", min=0, below=2**63)

    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = flag(
        "auto", "precision of the computation; auto: bfloat16 where the hardware has it, else float16 on CUDA and "
        "float32 elsewhere", choices=["auto", *DTYPES],
    )  # fmt: skip
    compile: bool = flag(False, "compile the model: slower start, faster steps (on a CPU it needs a C++ compiler)")
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass, and the loss in parts: less memory, slower"
    )
    num_workers: int = flag(1, "threads that prepare the next batches; 0: prepare each batch when it is needed", min=0)
    local_rank: int = flag(0, "set by launchers, and ignored: the environment variable LOCAL_RANK is used")
    deepspeed: Path | None = flag(
        None, "shard optimizer, gradients or weights over the processes with DeepSpeed, as this file says (configs/)",
        metavar="FILE",
    )  # fmt: skip
    fsdp: bool = flag(False, "shard weights, gradients and optimizer over the processes with PyTorch's FSDP2")
    timeout: float = flag(600.0, "seconds to wait for a process that does not respond; then the error names it", min=1)

    val_fraction: float = flag(
        0.01, "share of the documents held out for validation, chosen by content; 0: none", min=0, below=1
    )
    val_tokens: int = flag(100_000, "hold out at most about this many tokens", min=0)
    val_interval: int = flag(200, "optimizer steps between validations (and after the last step)", min=1)
    log_interval: int = flag(10, "optimizer steps between log lines", min=1)
    sample_interval: int = flag(
        0,
        "optimizer steps between texts that the model writes from fixed prompts, for the log and the report; 0: none",
        min=0,
    )
    compare: list[Path] = flag(
        [], "metrics files of other runs, whose curves the plot and the report show too, over the tokens seen; those in "
        "docs/results/curves are of healthy runs", nargs="+", metavar="FILE",
    )  # fmt: skip
    save_interval: int = flag(200, "optimizer steps between saves of weights and training state", min=1)
    keep: int = flag(2, "number of training states to keep (the newest)")
    save_dtype: str = flag(
        "float32", "precision of the .pth file (the training state is always float32)", choices=DTYPES
    )
    resume: str | None = flag(
        None, "continue a stopped run exactly, with its own flags where none are given. Without a value: from the newest "
        "state; PATH: from that state; auto: continue if there is a state, else start", nargs="?", const="newest",
        metavar="auto|PATH",
    )  # fmt: skip
    overwrite: bool = flag(False, "replace the files of an earlier run; they stay until this one has saved something")

    use_wandb: bool = flag(False, "log to Weights & Biases (without an account: offline, into OUT_DIR/wandb)")
    wandb_project: str = flag("MiniMind", "wandb project")
    wandb_run_name: str | None = flag(None, "wandb run name (default: stage and size)")
    use_tensorboard: bool = flag(False, "log to TensorBoard, into OUT_DIR/tensorboard")
    profile: int = flag(
        0, "record this many optimizer steps, after a short warm-up, as a trace for chrome://tracing in OUT_DIR; 0: none",
        metavar="N", min=0,
    )  # fmt: skip

    @classmethod
    def stored_flags(cls, given: dict[str, Any], typed: set[str]) -> dict[str, Any]:
        """Return the flags of the run that --resume continues; {} if there is none."""
        if given["resume"] is None:
            return {}
        shape = PRESETS.get(given["preset"], {}) | {k: v for k, v in given.items() if k in ("dim", "use_moe") and v}
        size = f"{shape['dim']}{'_moe' if shape.get('use_moe') else ''}" if "dim" in shape else r"\d+(_moe)?"
        name = re.compile(re.escape(cls.stage.format(**given)) + rf"_{size}\.resume")
        folder = given["out_dir"] if given["resume"] in ("newest", "auto") else Path(given["resume"])
        found = (path for levels in ("", "step_*/", "*.resume/step_*/") for path in folder.glob(f"{levels}COMPLETE"))
        markers = (path for path in found if name.fullmatch(path.absolute().parts[-3]))  # of this stage
        try:
            newest = max(markers, key=lambda path: path.stat().st_mtime)
            description = newest.parent / "run.json"
            if checksum(description) != json.loads(newest.read_bytes())["run.json"]:
                return {}
            stored = json.loads(description.read_bytes())["options"]
            model = stored.pop("model")
            not_restored = ("resume", "overwrite", "out_dir", "local_rank", "profile", "compare")
            kept = {k: v for k, v in stored.items() if k not in not_restored}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return {}  # there is none, or it is damaged: that is reported when it is loaded
        if "epochs" in typed:  # max_steps would count instead
            kept.pop("max_steps", None)
        shown = [
            f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in (kept | model).items()
            if name in given and name not in typed and json.dumps(given.get(name), default=str) != json.dumps(value)
        ]
        if shown and os.environ.get("RANK", "0") == "0":
            print(f"--resume: flags of {newest.parent}: {', '.join(shown)}")
        return kept | model

    def __post_init__(self) -> None:
        if self.optimizer == "auto":
            self.optimizer = "muon" if self.deepspeed is None else "adamw"
        for name, value in self.recipes.get(self.optimizer, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def validate(self) -> list[str]:
        """Return everything that is wrong with the flags; each message names its flag."""
        seq_len = self.model.get("max_seq_len", 2)
        rules = {
            f"--max_seq_len {seq_len}: a row of one token has nothing to predict": seq_len >= 2,
            f"--keep {self.keep} must be at least 2: a power cut may destroy the state being written": self.keep >= 2,
            "--resume continues a run and --overwrite replaces it: give one of them": not (
                self.resume and self.overwrite
            ),
            "--fsdp and --deepspeed are two ways to do the same: give one of them": not (self.fsdp and self.deepspeed),
            f"--mix needs a share for each file of --data_path: {len(self.mix)} for {len(self.data_path)}": (
                len(self.mix) in (0, len(self.data_path))
            ),
            "--mix: shares must be above 0; leave out a file that is not wanted": all(0 < x < 1e9 for x in self.mix),
            "--mix with one file has nothing to mix: name more in --data_path": (
                len(self.mix) != 1 or len(self.data_path) != 1
            ),
            "--mix: --data_path names a file twice": not self.mix or len({*self.data_path}) == len(self.data_path),
        }
        found = [error for error, kept in rules.items() if not kept]
        found += validate_folder("--out_dir", self.out_dir)
        found += validate_folder("--cache_dir", self.cache_dir) if self.cache_dir is not None else []
        for path in self.compare:
            try:
                known = any({"tokens", "loss"} <= line.keys() for line in read_metrics(path))
            except (OSError, ValueError):
                known = False
            if not known:
                found.append(f"--compare {path} holds no metrics of a run: name an OUT_DIR/<run>.metrics.jsonl")
        try:
            self.config()
        except ValueError as error:
            found.append(str(error))
        from model.device import resolve_device, resolve_dtype  # loads torch

        try:
            device = resolve_device(self.device)
            dtype = str(resolve_dtype(self.dtype, device)).removeprefix("torch.")
            found += self._validate_parallelism(device, dtype)
        except ValueError as error:
            found.append(str(error))
        return found

    def _validate_parallelism(self, device: torch.device, dtype: str) -> list[str]:
        found = []
        for name in [name for name in ("fsdp", "deepspeed") if getattr(self, name)]:
            if dtype == "float16":
                found.append(
                    f"--{name} with --dtype float16 is not supported: use bfloat16 or float32, or leave --{name} out"
                )
            if self.auto_batch:
                found.append(
                    f"--auto_batch cannot repeat a step that failed with --{name}: leave it out, and use a smaller "
                    "--batch_size with more --accumulation_steps"
                )
            if device.type == "mps":
                found.append(f"--{name} needs CUDA devices or CPUs: leave it out")
        if self.shards_weights and self.sample_interval:
            found.append(
                "--sample_interval needs the whole model in one process: leave it out where weights are sharded"
            )
        if self.deepspeed is not None:
            if self.optimizer != "adamw":
                found.append(f"--optimizer {self.optimizer} with --deepspeed is not supported: use adamw, or --fsdp")
            elif self.embedding_lr_scale != 1:
                found.append("--embedding_lr_scale with --deepspeed is not supported: leave it out, or use --fsdp")
            if self.compile:
                found.append("--compile and --deepspeed do not work together: leave one of them out")
            found += validate_zero_config(self.deepspeed)
        return found

    @property
    def cache_folder(self) -> Path:
        """Return the folder for tokens, reference log-probabilities and image features, each computed once."""
        return self.cache_dir or self.out_dir / "cache"

    @property
    def shards_weights(self) -> bool:
        """Return whether every process holds only a part of the weights."""
        return self.fsdp or (
            self.deepspeed is not None and read_zero_config(self.deepspeed)["zero_optimization"]["stage"] == 3
        )

    def config(self) -> LMConfig:
        """Return the model that --preset and single fields ask for."""
        from model.LMConfig import preset  # loads transformers

        return preset(self.preset or "minimind-v1-small", **self.model)

    def flags(self) -> list[str]:
        """Return the flags that repeat this run: those with other values than the defaults."""
        defaults = type(self)().describe()
        values = {name: value for name, value in self.describe().items() if value != defaults[name]}
        words = []
        for name, value in (values | values.pop("model", {})).items():
            if name in ("resume", "overwrite", "local_rank") or value is None:
                continue
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                if isinstance(value, dict):  # rope_scaling
                    value = f"{value['rope_type']}:{value['factor']:g}"
                given = value if isinstance(value, list) else [value]
                words += [f"--{name}", *map(str, given)]
        return words

    def describe(self) -> dict:
        """Return the flags as JSON-friendly values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


@dataclass
class TuneOptions(TrainOptions):
    """Flags of the stages that start from a trained model."""

    init_from: str | None = flag(
        None, "weights to start from; none for random ones (default: the newest fitting checkpoint in OUT_DIR)",
        metavar="FILE|none",
    )  # fmt: skip


@dataclass
class DialogueOptions(TuneOptions):
    """Flags of the stages that learn from dialogues."""

    show_sample: bool = flag(False, "print one sample with the text that the model learns marked")


@dataclass
class RolloutOptions(TuneOptions):
    """Flags of the stages that learn from the model's own answers."""

    num_workers: int = flag(0, "ignored: every batch waits for the weights of its step", min=0)
    algorithm: str = flag("grpo", "how it learns from rewards", choices=ALGORITHMS)
    group_size: int = flag(8, "answers to each prompt of a step, which are compared with each other", min=1)
    steps_per_generation: int = flag(
        1, "optimizer steps on the answers of one generation, each on other prompts: more decode faster together, but "
        "the later steps learn from answers of older weights; --save_interval must be a multiple", min=1,
    )  # fmt: skip
    max_new_tokens: int = flag(
        256, "maximum length of an answer in tokens; longer ones are cut and get no reward", min=1
    )
    max_tool_calls: int = flag(
        4, "maximum number of calls on the way to an answer; with more there is no reward", min=0
    )
    tools: list[str] = flag(
        [], "functions of your own as module:function, which prompts may name beside our tools", nargs="+"
    )
    verifier: str | None = flag(
        None, "how answers are checked where a prompt does not say it: NAME[:WEIGHT],... or module:function; see "
        "evaluation/verifiers.py", metavar="SPEC",
    )  # fmt: skip
    gamma: float = flag(1.0, "ppo: discount of the reward for each token before it", above=0, max=1)
    gae_lambda: float = flag(1.0, "ppo: 1: advantages from rewards alone; less: also from later values", min=0, max=1)
    show_interval: int = flag(50, "optimizer steps between two answers that are printed", min=1)

    def validate(self) -> list[str]:
        rules = {
            f"--group_size {self.group_size}: {self.algorithm} compares answers to the same prompt: give at least 2": (
                self.group_size > 1 or self.algorithm == "ppo"
            ),
            f"--save_interval {self.save_interval} must be a multiple of --steps_per_generation": (
                self.save_interval % self.steps_per_generation == 0
            ),
            "--fsdp and --deepspeed do not support this stage: leave them out (torchrun without them works)": not (
                self.fsdp or self.deepspeed
            ),
        }
        return super().validate() + [error for error, kept in rules.items() if not kept]


@dataclass
class VisionOptions(DialogueOptions):
    """Flags of the stages that learn from images."""

    freeze: str = flag(
        "none", "what of the language model stays as it is: language: all of it; middle: all but its first and last layer; "
        "none", choices=["language", "middle", "none"],
    )  # fmt: skip
    vision_encoder: Path | None = flag(
        None, "folder of the image model that makes features of the images (default: that of the weights it starts from)",
        metavar="FOLDER",
    )  # fmt: skip

    def validate(self) -> list[str]:
        found = super().validate()
        if self.fsdp or self.deepspeed is not None:
            found.append(
                "--fsdp and --deepspeed do not support vision-language models: leave them out (torchrun without them works)"
            )
        if self.freeze != "none" and self.embedding_lr_scale != 1:
            found.append(f"--embedding_lr_scale: --freeze {self.freeze} freezes the embedding: leave one of them out")
        return found


# ---- the JSON file of --deepspeed
#
# What a flag decides belongs on the command line only: in the file it may be missing or "auto", because of two values one
# would be ignored silently.

_DECIDED_BY = {
    "train_micro_batch_size_per_gpu": "--batch_size", "gradient_accumulation_steps": "--accumulation_steps",
    "train_batch_size": "--batch_size", "gradient_clipping": "--grad_clip", "bf16": "--dtype", "fp16": "--dtype",
    "optimizer": "--optimizer", "scheduler": "--warmup_iters",
}  # fmt: skip
_ALLOWED = {
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
}  # fmt: skip


def read_zero_config(path: Path) -> dict:
    """Return the content of a DeepSpeed file. Raise UserError if it is not an object with a ZeRO stage."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed {path} cannot be read ({error}); configs/ has some to choose from") from None
    section = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(section, dict) or section.get("stage") not in (1, 2, 3):
        raise UserError(
            f'--deepspeed {path}: "zero_optimization" needs a "stage" of 1, 2 or 3; to train without ZeRO, leave '
            "--deepspeed out"
        )
    return config


def validate_zero_config(path: Path) -> list[str]:
    """Return everything in a DeepSpeed file that a flag decides or that is not supported."""
    try:
        config = read_zero_config(path)
    except UserError as error:
        return [str(error)]
    found = [
        f'"{name}" is what {flag} says: remove it there, or write "auto"'
        for name, flag in _DECIDED_BY.items()
        if any(value != "auto" for value in _leaves(config.get(name, "auto")))
    ]
    if unknown := sorted(config.keys() - _ALLOWED - _DECIDED_BY.keys()):
        found.append(f"not supported here: {', '.join(unknown)}: remove it there")
    for name in ("offload_optimizer", "offload_param"):
        if (config["zero_optimization"].get(name) or {}).get("device") == "nvme":
            found.append(f'"{name}" to nvme is not supported; "cpu" is')
    return [f"--deepspeed {path}: {error}" for error in found]


def _leaves(value: Any) -> list:
    """Return the values inside nested objects, except names of classes, such as an optimizer's "type"."""
    if not isinstance(value, dict):
        return [value]
    return [leaf for name, inner in value.items() if name != "type" for leaf in _leaves(inner)]
