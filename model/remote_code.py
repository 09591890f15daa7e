"""The code of the model beside its weights, so that `trust_remote_code=True` loads the folder without this project."""

from __future__ import annotations

import re
from pathlib import Path

AUTO_MAP = {"AutoConfig": "LMConfig.LMConfig", "AutoModelForCausalLM": "model.Transformer"}
VISION_AUTO_MAP = {
    "AutoConfig": "LMConfig.LMConfig",
    "AutoModelForCausalLM": "vision.VisionLanguageModel",
    "AutoModelForImageTextToText": "vision.VisionLanguageModel",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processor.VisionLanguageProcessor"}
_ROOT = Path(__file__).resolve().parents[1]
_PROJECT_IMPORT = re.compile(r"^from (model|common)\.(\w+) import", re.MULTILINE)


def copy_code(folder: Path, vision: bool = False) -> None:
    """Copy model/model.py and every module it needs into one flat package: `from model.moe` becomes `from .moe`.

    vision: also model/vision.py and model/processor.py.
    """
    pending: list[tuple[str, str]] = [("model", name) for name in (["vision", "processor"] if vision else ["model"])]
    copied: set[tuple[str, str]] = set()
    while pending:
        package, module = pending.pop()
        source = (_ROOT / package / f"{module}.py").read_text(encoding="utf-8")
        code = _PROJECT_IMPORT.sub(r"from .\2 import", source)
        (folder / f"{module}.py").write_text(code, encoding="utf-8", newline="\n")
        copied.add((package, module))
        pending += set(_PROJECT_IMPORT.findall(source)) - copied
