"""List the models in a folder: weights of every stage, LoRA adapters, exported folders.

    for entry in list_models(Path("out")):
        print(entry.path, entry.stage, entry.size, entry.loss)

Only names, sizes and JSON files are read, so this takes milliseconds however large the models are. A damaged model is
reported when it is loaded.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import file_stamp, read_json_or_empty
from model.architecture import Architecture, checkpoint_name

WEIGHTS, ADAPTER, EXPORT = "weights", "adapter", "export"
_STAGE_IN_NAME = re.compile(r"(pretrain_vlm|sft_vlm|pretrain|full_sft|rl|rlvr|distill|lora)_")
CHAT_STAGES = ("full_sft", "rl", "rlvr", "distill", "lora")


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
    stamp: tuple[tuple[int, int] | None, ...]
    base: str | None = None
    loss: float | None = None
    step: int | None = None
    total_steps: int | None = None

    @property
    def finished(self) -> bool:
        """Return whether its run did all its steps; True where they are not recorded, as for published weights."""
        return self.step is None or self.total_steps is None or self.step >= self.total_steps

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
    if path.suffix == ".pth" and os.path.isfile(path):
        description = path.with_suffix(".json")
        kind, files = WEIGHTS, [path]
    elif path.name.endswith(".tmp"):
        return None
    elif os.path.isfile(path / "adapter_config.json"):  # not Path.is_file: a folder may be forbidden
        kind, files = ADAPTER, [path / "adapter_model.safetensors", path / "adapter_config.json"]
    elif os.path.isfile(path / "config.json"):
        kind, files = EXPORT, [path / "model.safetensors", path / "config.json"]
    else:
        return None
    info = read_json_or_empty(description)  # loading the model reports what is wrong with it
    stage, base, loss = (info.get(key) for key in ("stage", "base", "loss"))
    step, total_steps = (value if isinstance(value := info.get(key), int) else None for key in ("step", "total_steps"))
    if not isinstance(stage, str):
        in_name = _STAGE_IN_NAME.match(path.name)
        stage = "lora" if kind == ADAPTER else in_name[1] if in_name else ""
    files.append(description)
    if kind == ADAPTER and isinstance(base, str):
        files.append(path.parent / base)  # merged into it: another base is another model
    stamp = tuple(map(file_stamp, files))
    if stamp[0] is None:  # the weights are missing, or were deleted meanwhile
        return None
    written, size = stamp[0]
    return Entry(
        path=path,
        kind=kind,
        stage=stage,
        size=size,
        written=written,
        stamp=stamp,
        base=base if isinstance(base, str) else None,
        loss=float(loss) if isinstance(loss, (int, float)) and math.isfinite(loss) else None,
        step=step,
        total_steps=total_steps,
    )


def default_model(entries: list[Entry]) -> Entry:
    """Return the newest model that answers questions, a finished one if possible; if there is none, the newest."""
    answering = [entry for entry in entries if entry.stage in CHAT_STAGES and entry.kind != EXPORT]
    return _newest_finished(answering) if answering else entries[0]


def _newest_finished(entries: list[Entry]) -> Entry:
    """Return the newest model whose run is finished; if there is none, the newest. `entries`: the newest first."""
    return next((entry for entry in entries if entry.finished), entries[0])


def find_model(
    out_dir: Path, stages: Sequence[str], config: Architecture | None = None, flag: str = "--weights"
) -> Path | None:
    """Return the newest finished model of `stages` in a folder, else the newest unfinished one, or None.

    Print what was chosen if there was a choice, or if it is unfinished. "lora" stands for the folders of adapters.

    Args:
        config: find only weights with its size in their names; None: of any size.
        flag: of the script, that names another model.
    """
    fitting = [entry for entry in list_models(out_dir) if _fits(entry, stages, config)]
    if not fitting:
        return None
    chosen = _newest_finished(fitting)
    newer = fitting[: fitting.index(chosen)]
    if len(fitting) > 1 or not chosen.finished:
        text = f"using {_label(chosen)}"
        if len(fitting) > 1:
            text += f", the newest {'finished ' if newer else ''}one of {len(fitting)} that fit"
        text += f"; newer: {', '.join(map(_label, newer))}" if newer else ""
        print(f"{text}; {flag} names another")
    return chosen.path


def _fits(entry: Entry, stages: Sequence[str], config: Architecture | None) -> bool:
    name = entry.path.name
    if entry.kind == ADAPTER:
        return "lora" in stages and name.startswith("lora_")
    if config is None:
        return any(re.fullmatch(rf"{stage}_\d+(_moe)?\.pth", name) for stage in stages)
    return name in [checkpoint_name(stage, config) for stage in stages]


def _label(entry: Entry) -> str:
    if entry.step is None:
        return str(entry.path)
    of_total = f" of {entry.total_steps}" if entry.total_steps is not None else ""
    return f"{entry.path} ({'' if entry.finished else 'unfinished: '}step {entry.step}{of_total})"


def require_model(out_dir: Path, stages: Sequence[str], script: str) -> Path:
    """Return `find_model`'s result. Raises UserError if there is none; `script` makes one."""
    path = find_model(out_dir, stages)
    if path is None:
        names = ", ".join("lora_*" if stage == "lora" else f"{stage}_*.pth" for stage in stages)
        raise UserError(f"no {names} in {out_dir}: run {script}, or name a model with --weights")
    return path
