"""Which models a folder holds: weights of every stage, LoRA adapters, exported folders.

    for entry in list_models(Path("out")):
        print(entry.path, entry.stage, entry.size, entry.loss)

Only names, sizes and JSON files are read, so this takes milliseconds whatever the models' sizes. What is wrong with a
model is found out, and said, when it is loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from model.architecture import Architecture, checkpoint_name

WEIGHTS, ADAPTER, EXPORT = "weights", "adapter", "export"
# Files that make up a model, the heavy one first.
_FILES = {
    ADAPTER: ("adapter_model.safetensors", "adapter_config.json", "minimind.json"),
    EXPORT: ("model.safetensors", "config.json", "minimind.json"),
}
_STAGE_IN_NAME = re.compile(r"(pretrain|full_sft|rl|lora)_")
CHAT_STAGES = ("full_sft", "rl", "lora")


@dataclass(frozen=True)
class Entry:
    """A model on the disk. `stamp` changes with any of its files; two entries are equal if nothing changed.

    stage is "" if nothing tells it; base is the name of an adapter's base; size is in bytes; written in ns since 1970.
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
        """Whether it goes on with a text instead of answering: nobody has shown it a dialogue yet."""
        return self.stage == "pretrain"


def list_models(folder: Path) -> list[Entry]:
    """The models in a folder, the one written last first. A folder that is not there has none."""
    try:
        paths = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [entry for path in paths if not path.name.startswith(".") and (entry := read_entry(path)) is not None]
    return sorted(found, key=lambda entry: (-entry.written, entry.path))


def read_entry(path: Path) -> Entry | None:
    """What is at `path`; None if that is not a model, or is gone by now."""
    if path.name.endswith(".tmp"):
        return None
    if path.suffix == ".pth" and path.is_file():
        return _entry(path, WEIGHTS, [path, path.with_suffix(".json")], _read_json(path.with_suffix(".json")))
    if (path / "adapter_config.json").is_file():
        info = _read_json(path / "minimind.json")
        files = [path / name for name in _FILES[ADAPTER]]
        base = info.get("base")
        if isinstance(base, str):
            files.append(path.parent / base)  # merged into it: another base is another model
        return _entry(path, ADAPTER, files, {"stage": "lora", **info})
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        return _entry(path, EXPORT, [path / name for name in _FILES[EXPORT]], _read_json(path / "minimind.json"))
    return None


def default_model(entries: list[Entry]) -> Entry:
    """The newest that answers, else the newest."""
    return next((entry for entry in entries if entry.stage in CHAT_STAGES and entry.kind != EXPORT), entries[0])


def find_model(out_dir: Path, stages: Sequence[str], config: Architecture | None = None) -> Path | None:
    """Return the model of `stages` in a folder that was written last, or None. "lora" stands for the folders of adapters.

    config: find only weights with its size in their names; None: of any size.
    """
    ending = r"_\d+(_moe)?\.pth" if config is None else re.escape(checkpoint_name("", config))
    weights = re.compile(rf"({'|'.join(map(re.escape, stages))}){ending}")
    for entry in list_models(out_dir):
        named = entry.path.name.startswith("lora_") if entry.kind == ADAPTER else weights.fullmatch(entry.path.name)
        if named and (entry.kind == WEIGHTS or "lora" in stages):
            return entry.path
    return None


def require_model(out_dir: Path, stages: Sequence[str], script: str) -> Path:
    """Return `find_model`'s result. Raises UserError if there is none; `script` makes one."""
    path = find_model(out_dir, stages)
    if path is None:
        names = ", ".join("lora_*" if stage == "lora" else f"{stage}_*.pth" for stage in stages)
        raise UserError(f"no {names} in {out_dir}: run {script}, or name a model with --weights")
    return path


def _entry(path: Path, kind: str, files: list[Path], info: dict) -> Entry | None:
    stamp = tuple(_stamps(files))
    if not stamp or stamp[0] == (0, 0):  # the weights went away between two looks
        return None
    stage, base, loss, step = (info.get(key) for key in ("stage", "base", "loss", "step"))
    if not isinstance(stage, str):
        in_name = _STAGE_IN_NAME.match(path.name)
        stage = in_name[1] if in_name else ""
    return Entry(
        path=path,
        kind=kind,
        stage=stage,
        size=stamp[0][1],
        written=stamp[0][0],
        stamp=stamp,
        base=base if isinstance(base, str) else None,
        loss=float(loss) if isinstance(loss, (int, float)) and math.isfinite(loss) else None,
        step=step if isinstance(step, int) else None,
    )


def _stamps(files: list[Path]) -> Iterator[tuple[int, int]]:
    """(time of writing in ns, bytes) of each file, (0, 0) for one that is not there."""
    for file in files:
        try:
            stat = file.stat()
        except OSError:
            yield (0, 0)
        else:
            yield (stat.st_mtime_ns, stat.st_size)


def _read_json(path: Path) -> dict:
    """The object in a file; {} if there is none that can be read: loading the model will say so."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
