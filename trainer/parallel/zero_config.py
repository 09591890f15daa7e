"""The JSON files of `--deepspeed`: read, checked, and filled in from our flags.

What a flag says stands in one place only, on the command line. In a file such a value may be missing, "auto", or the
same; another one is refused by name, because one of the two would be wrong silently.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from trainer.optim import BETAS

# What a file may hold beside the values that come from flags.
_FREE = {
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
}  # fmt: skip
_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}


def read_zero_config(path: Path) -> dict:
    """The content of a file, in itself sound: an object with a ZeRO stage. ValueError if it is not."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"--deepspeed {path} cannot be read ({error.strerror}); configs/ has some to choose from"
        ) from None
    except ValueError as error:
        raise ValueError(f"--deepspeed {path} is not JSON ({error})") from None
    section = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(section, dict) or section.get("stage") not in (1, 2, 3):
        raise ValueError(
            f'--deepspeed {path}: "zero_optimization" needs a "stage" of 1, 2 or 3; to train without ZeRO, leave '
            "--deepspeed out"
        )
    return config


def validate_zero_config(path: Path, options, dtype: str) -> list[str]:
    """Everything in the file that contradicts the flags, each in words that name both.

    dtype: of the computation, such as "bfloat16".
    """
    try:
        config = read_zero_config(path)
    except ValueError as error:
        return [str(error)]
    found = []
    for name, (value, flags) in _from_flags(options).items():
        if config.get(name, "auto") not in ("auto", value):
            found.append(f'--deepspeed {path}: "{name}" is {config[name]}, but {flags} says {value}: remove it there')
    for name, precision in _PRECISIONS.items():
        enabled = config.get(name, {}).get("enabled", "auto")
        if enabled not in ("auto", dtype == precision):
            found.append(f'--deepspeed {path}: "{name}" is {enabled}, but --dtype says {dtype}: remove it there')
    optimizer = config.get("optimizer", {})
    known = {"lr": options.learning_rate, "weight_decay": options.weight_decay, "betas": list(BETAS), "eps": 1e-8}
    wrong = [k for k, v in optimizer.get("params", {}).items() if v not in ("auto", known.get(k))]
    if optimizer.get("type", "AdamW") not in ("Adam", "AdamW") or wrong:
        what = f"{wrong[0]} of " if wrong else ""
        found.append(
            f'--deepspeed {path}: {what}"optimizer" is not what --optimizer, --learning_rate and --weight_decay say: '
            "remove it there"
        )
    taken = {*_FREE, *_from_flags(options), *_PRECISIONS, "optimizer"}
    unknown = sorted(config.keys() - taken)
    if unknown:
        found.append(f"--deepspeed {path}: not supported here: {', '.join(unknown)}: remove it there")
    section = config["zero_optimization"]
    on_disk = [k for k in ("offload_optimizer", "offload_param") if (section.get(k) or {}).get("device") == "nvme"]
    if on_disk:
        found.append(f'--deepspeed {path}: "{on_disk[0]}" to nvme is not supported; "cpu" is')
    if dtype == "float16":
        found.append(
            "--deepspeed with --dtype float16 is not supported: use bfloat16 or float32, or leave --deepspeed out"
        )
    if options.optimizer != "adamw":
        found.append(f"--optimizer {options.optimizer} needs whole matrices and --deepspeed splits them: use adamw")
    if options.compile:
        found.append("--compile and --deepspeed do not go together: leave one of them out")
    return found


def complete_zero_config(path: Path, options, dtype: str) -> dict:
    """The file with everything filled in that the flags say, as `deepspeed.initialize` takes it."""
    config = {k: v for k, v in read_zero_config(path).items() if k not in {*_PRECISIONS, "optimizer"}}
    config |= {name: value for name, (value, _) in _from_flags(options).items()}
    # Weights stay float32 and products are computed in --dtype, as without DeepSpeed: the same run.
    config["torch_autocast"] = {"enabled": dtype != "float32", "dtype": dtype}
    config = {"steps_per_print": 1_000_000_000, "zero_allow_untested_optimizer": True} | config
    return config | {"zero_force_ds_cpu_optimizer": False}


def _from_flags(options) -> dict[str, tuple[float, str]]:
    """DeepSpeed's name -> (value, the flags that say so)."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "train_micro_batch_size_per_gpu": (options.batch_size, "--batch_size"),
        "gradient_accumulation_steps": (options.accumulation_steps, "--accumulation_steps"),
        "train_batch_size": (
            options.batch_size * options.accumulation_steps * size,
            "--batch_size * --accumulation_steps * processes",
        ),
        "gradient_clipping": (options.grad_clip, "--grad_clip"),
    }
