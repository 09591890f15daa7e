"""List the models in a folder: weights of every stage, LoRA adapters, exported folders.

    for entry in list_models(Path("out")):
        print(entry.path, entry.stage, entry.size, entry.loss)

Only names, sizes and JSON files are read, so this takes milliseconds however large the models are. A damaged model is
reported when it is loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from model.architecture import Architecture

WEIGHTS, ADAPTER, EXPORT = "weights", "adapter", "export"
_STAGE_IN_NAME = re.compile(r"(pretrain|full_sft|rl|lora)_")
CHAT_STAGES = ("full_sft", "rl", "lora")


@dataclass(frozen=True)
class Entry:
    """A model on the disk. `stamp` changes with any of its files; two entries are equal if nothing changed.

    stage: "" if unknown; size: in bytes; written: in ns since 1970; base: name of the weights an adapter was trained on.
    """

    path: Path
    kind: str
    stage: str
    size: int
    written: int
    stamp: tuple[tuple[int, int], ...]
    base: str | None = None
    loss: float | None = None
    step: int | None = None

    @property
    def continues(self) -> bool:
        """Return whether it continues a text instead of answering: it was not trained on dialogues yet."""
        return self.stage == "pretrain"


def list_models(folder: Path) -> list[Entry]:
    """Return the models in a folder, the newest first; none for a folder that does not exist."""
    try:
        paths = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [entry for path in paths if not path.name.startswith(".") and (entry := read_entry(path)) is not None]
    return sorted(found, key=lambda entry: (-entry.written, entry.path))


def read_entry(path: Path) -> Entry | None:
    """Return the model at `path`, or None if there is none."""
    description = path / "minimind.json"
    if path.suffix == ".pth" and path.is_file():
        description = path.with_suffix(".json")
        kind, files = WEIGHTS, [path]
    elif path.name.endswith(".tmp"):
        return None
    elif (path / "adapter_config.json").is_file():
        kind, files = ADAPTER, [path / "adapter_model.safetensors", path / "adapter_config.json"]
    elif (path / "config.json").is_file():
        kind, files = EXPORT, [path / "model.safetensors", path / "config.json"]
    else:
        return None
    info = _read_json(description)
    stage, base, loss, step = (info.get(key) for key in ("stage", "base", "loss", "step"))
    if not isinstance(stage, str):
        in_name = _STAGE_IN_NAME.match(path.name)
        stage = "lora" if kind == ADAPTER else in_name[1] if in_name else ""
    files.append(description)
    if kind == ADAPTER and isinstance(base, str):
        files.append(path.parent / base)  # merged into it: another base is another model
    stamp = tuple(map(_stamp, files))
    written, size = stamp[0]
    if (written, size) == (0, 0):  # the weights are missing, or were deleted meanwhile
        return None
    return Entry(
        path=path,
        kind=kind,
        stage=stage,
        size=size,
        written=written,
        stamp=stamp,
        base=base if isinstance(base, str) else None,
        loss=float(loss) if isinstance(loss, (int, float)) and math.isfinite(loss) else None,
        step=step if isinstance(step, int) else None,
    )


def _stamp(file: Path) -> tuple[int, int]:
    """Return (time of writing in ns, bytes) of a file; (0, 0) if it does not exist."""
    try:
        stat = file.stat()
    except OSError:
        return (0, 0)
    return (stat.st_mtime_ns, stat.st_size)


def _read_json(path: Path) -> dict:
    """Return the object in a file; {} if it cannot be read: loading the model reports that."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def default_model(entries: list[Entry]) -> Entry:
    """Return the newest model that answers questions; if there is none, the newest."""
    return next((entry for entry in entries if entry.stage in CHAT_STAGES and entry.kind != EXPORT), entries[0])


def checkpoint_name(stage: str, config: Architecture) -> str:
    """Return the file name of a stage's weights: `pretrain_512.pth`, `full_sft_512_moe.pth`."""
    return f"{stage}_{config.dim}{'_moe' if config.use_moe else ''}.pth"


def find_model(out_dir: Path, stages: Sequence[str], config: Architecture | None = None) -> Path | None:
    """Return the newest model of `stages` in a folder, or None. "lora" stands for the folders of adapters.

    config: find only weights with its size in their names; None: of any size.
    """
    for entry in list_models(out_dir):
        name = entry.path.name
        if entry.kind == ADAPTER:
            found = "lora" in stages and name.startswith("lora_")
        elif config is None:
            found = any(re.fullmatch(rf"{stage}_\d+(_moe)?\.pth", name) for stage in stages)
        else:
            found = name in [checkpoint_name(stage, config) for stage in stages]
        if found:
            return entry.path
    return None


def require_model(out_dir: Path, stages: Sequence[str], script: str) -> Path:
    """Return `find_model`'s result. Raises UserError if there is none; `script` makes one."""
    path = find_model(out_dir, stages)
    if path is None:
        names = ", ".join("lora_*" if stage == "lora" else f"{stage}_*.pth" for stage in stages)
        raise UserError(f"no {names} in {out_dir}: run {script}, or name a model with --weights")
    return path
