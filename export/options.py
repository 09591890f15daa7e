"""The flags of export_model.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from common.cli import flag, validate_folder
from common.files import ROOT
from model.architecture import TOKENIZER_DIR

GGUF_TYPES = {"float32": "f32", "float16": "f16", "q8_0": "q8_0"}
ALIASES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
MAX_TEXTS = 100


@dataclass
class ExportOptions:
    format: str = flag("llama", "see above", choices=["llama", "minimind", "gguf", "onnx", "pth"])
    weights: Path | None = flag(
        None,
        "a .pth file; for --format pth an exported folder (default: the newest of rlvr, rl, distill, full_sft, "
        "pretrain in OUT_DIR; with "
        "--lora the weights it was trained on)",
        metavar="PATH",
    )
    lora: Path | None = flag(None, "an adapter to merge into the weights first", metavar="FOLDER")
    vision_encoder: Path | None = flag(
        None, "folder of the CLIP of a model that sees through one (default: that of its training)", metavar="FOLDER"
    )
    output: Path | None = flag(
        None,
        "file or folder to write (default: OUT_DIR/<name of the weights>-<format>; for --format pth <folder>.pth)",
        metavar="PATH",
    )
    overwrite: bool = flag(False, "replace an existing export", action="store_true")
    dtype: str | None = flag(
        None,
        "precision of the weights; q8_0 only for gguf, bfloat16 not for gguf, onnx: float32 only (default: that of the "
        "file; gguf: float16)",
        choices=["bfloat16", "float16", "float32", "q8_0", *ALIASES],
    )
    tokenizer: Path = flag(TOKENIZER_DIR, "its folder (default: the one shipped in model/)")
    out_dir: Path = flag(ROOT / "out", "where checkpoints are looked for and exports go (default: out)")
    text: Path | None = flag(
        None,
        f"UTF-8 text for the comparison, one paragraph a line, at most {MAX_TEXTS} (default: a dozen sentences)",
        metavar="FILE",
    )
    tolerance: float | None = flag(
        None,
        "largest difference of logits allowed (default: 1e-4; minimind and gguf, whose logits are computed by our own "
        "code: 0)",
        min=0,
    )
    ceval: Path | None = flag(None, "summary.json of eval_ceval.py, for the model card", metavar="FILE")
    push_to_hub: str | None = flag(
        None, "also upload the folder to the Hugging Face Hub (log in before: hf auth login)", metavar="USER/NAME"
    )
    private: bool = flag(False, "make the repository there a private one", action="store_true")

    def __post_init__(self) -> None:
        self.dtype = ALIASES.get(self.dtype or "", self.dtype)

    def validate(self) -> list[str]:
        """Return everything that is wrong with the flags."""
        errors = []
        if self.dtype and self.format == "gguf" and self.dtype not in GGUF_TYPES:
            errors.append(f"--dtype {self.dtype} is not for --format gguf: use {', '.join(GGUF_TYPES)}")
        if self.dtype not in (None, "float32") and self.format == "onnx":
            errors.append(f"--dtype {self.dtype} is not for --format onnx: it is written in float32")
        elif self.dtype == "q8_0" and self.format != "gguf":
            errors.append("--dtype q8_0 needs --format gguf")
        if self.format == "pth":
            names = ("lora", "push_to_hub", "ceval", "out_dir", "tokenizer")
            unused = [name for name in names if getattr(self, name) != getattr(ExportOptions, name)]
            errors += [f"--{name} is not for --format pth" for name in unused]
            if self.weights is None:
                errors.append("--format pth needs --weights FOLDER")
        if self.push_to_hub is not None and not re.fullmatch(r"[^/\s]+/[^/\s]+", self.push_to_hub):
            errors.append(f"--push_to_hub {self.push_to_hub}: give user/name")
        if self.vision_encoder is not None and self.format != "llama":
            errors.append("--vision_encoder is for --format llama: no other one holds an encoder of its own folder")
        if self.private and self.push_to_hub is None:
            errors.append("--private is for --push_to_hub")
        if self.output is None:
            errors += validate_folder("--out_dir", self.out_dir) if self.format != "pth" else []
        else:
            errors += validate_folder("--output", self.output.parent)
            if not self.output.name:
                errors.append(f"--output {self.output}: name the file or folder to write")
            if self.format == "pth" and self.output.suffix != ".pth":
                errors.append(f"--output {self.output}: name a .pth file, which the other scripts find by this ending")
        return errors
