"""The flags that name a model to evaluate. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.cli import flag
from model.architecture import TOKENIZER_DIR


@dataclass
class EvaluatedModelOptions:
    """Name the model that an evaluation asks, and say how it runs."""

    weights: Path | None = flag(None, ".pth file (default: the newest of rlvr, rl, distill and full_sft in out)")
    lora: Path | None = flag(None, "adapter folder; its base is found from the adapter's description")
    hf: Path | None = flag(None, "folder that transformers can load: an export, or another model")
    trust_remote_code: bool = flag(False, "let --hf run Python code in that folder", action="store_true")
    tokenizer: Path = flag(TOKENIZER_DIR, "tokenizer folder for .pth files (default: in model/)")
    max_seq_len: int | None = flag(
        None, "longest prompt in tokens (default: the length the model was trained at)", min=8
    )
    batch_tokens: int | None = flag(None, "tokens in one forward pass (default: 512 on a CPU, else 16384)", min=1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")

    def validate(self) -> list[str]:
        """Return what is wrong with the values, each in words that name the flag."""
        named = [f"--{name}" for name in ("weights", "lora", "hf") if getattr(self, name) is not None]
        errors = [f"{' and '.join(named)} name different models: give only one of them"] if len(named) > 1 else []
        if self.trust_remote_code and self.hf is None:
            errors.append("--trust_remote_code is for --hf")
        return errors
