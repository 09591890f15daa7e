"""LoRA adapters (https://arxiv.org/abs/2106.09685), made with peft: add, save, load and merge them.

An adapter is a folder that peft can load, plus `minimind.json` with the fingerprint of the weights it was trained on.
Applied to other weights of the same shape, an adapter would load without an error and answer nonsense; here that is
refused.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.errors import UserError, first_line
from common.files import atomic_folder, recover_folder, write_json
from model.model import Transformer
from model.weights import load_checkpoint
from model.weights_file import Checkpoint

if TYPE_CHECKING:
    from peft import PeftModel  # imported where it is used: it takes a second to load

# Every linear layer of attention and feed-forward, experts included. The router is none: it stays as it was.
ALL_PROJECTIONS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
DESCRIPTION = "minimind.json"


def add_adapter(
    model: Transformer, *, rank: int, alpha: float, dropout: float, targets: Sequence[str] = ALL_PROJECTIONS
) -> PeftModel:
    """Freeze `model` and add a trainable pair of low-rank matrices to each of its `targets`.

    A weight W becomes W + alpha / rank * B A, with A (rank, in) random and B (out, rank) zero: at first nothing changes.
    Raises UserError for a target that matches no part of the model.
    """
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    names.discard("output")  # it is the embedding: an adapter merged into it would change that too
    unknown = sorted(set(targets) - names)
    if unknown or not targets:
        what = f"no linear layer that can have an adapter is called {', '.join(unknown)}" if unknown else "none named"
        raise UserError(f"{what}; there are {', '.join(sorted(names))}")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes fractions, and declares int
        lora_dropout=dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers under an old name
        return get_peft_model(model, config)


def trainable_share(model: PeftModel) -> str:
    """Return how much of the model is trained, as a sentence."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"{trainable / 1e6:.3f}M of {total / 1e6:.2f}M parameters are trained ({trainable / total:.2%})"


def save_adapter(
    folder: Path,
    model: PeftModel,
    base: Checkpoint,
    info: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write the adapter folder, completely or not at all. Raises UserError for weights that are not finite.

    tensors: the adapter's parameters by their names in `model`, where those in it are sharded.
    """
    if tensors is None:
        tensors = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    state = {name: tensor.detach().cpu() for name, tensor in tensors}
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise UserError(f"{broken[0]} is not finite; {folder} is left as it was")
    # Where peft writes a model's name or path, which ours does not have.
    model.peft_config["default"].base_model_name_or_path = base.path.name
    with atomic_folder(folder) as tmp:
        # peft would ask a hub for the base's vocabulary size to see whether embeddings were resized: ours never are.
        model.save_pretrained(str(tmp), state_dict=state, save_embedding_layers=False)
        description = {
            "base": base.path.name,
            "base_fingerprint": base.fingerprint,
            "config": base.config.own_fields(),
            **info,
        }
        write_json(tmp / DESCRIPTION, description)


def load_adapter(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    base: Path | str | None = None,
) -> Checkpoint:
    """Return the base of an adapter with the adapter merged into its weights, as a checkpoint like any other.

    base: the weights it was trained on; None: the file of the recorded name beside the folder.
    Raises UserError if the folder is not an adapter of this toolkit, or if its base is missing or has changed.
    """
    folder = Path(folder)
    description = read_description(folder)
    base_path = Path(base) if base is not None else folder.parent / description["base"]
    if not base_path.is_file():
        raise UserError(f"{folder}: its base {base_path} does not exist; put {description['base']} there")
    fields = ("max_seq_len", "rope_scaling")  # those in which it may differ from its base
    trained_with = {name: value for name, value in description["config"].items() if name in fields}
    checkpoint = load_checkpoint(base_path, device, torch.float32, tokenizer, trained_with)
    if checkpoint.fingerprint != description["base_fingerprint"]:
        raise UserError(
            f"{folder} was trained on other weights ({description['base']}, {description['base_fingerprint']}) than "
            f"{base_path} holds now ({checkpoint.fingerprint}): train the adapter again, or find its base"
        )
    checkpoint.model = apply_adapter(checkpoint.model, folder).merge_and_unload(safe_merge=True).eval()
    checkpoint.model.to(dtype=dtype or torch.float32)  # type: ignore[call-arg]  # transformers wraps it without types
    checkpoint.info = description
    checkpoint.path = folder
    checkpoint.notes.append(f"adapter {folder.name} merged into {base_path.name}")
    return checkpoint


def apply_adapter(model: Transformer, folder: Path) -> PeftModel:
    """Return `model` with the adapter of `folder` applied. Raises UserError if they do not fit each other."""
    from peft import PeftModel

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():  # peft would look on a hub for one that is called like the folder
            raise UserError(f"{folder} is not a complete adapter: there is no {name} in it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers under an old name
            warnings.simplefilter("error", UserWarning)  # missing and unexpected keys are only warned about
            return PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, UserWarning, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} does not fit this model, or is damaged: {first_line(error)}") from error


def read_description(folder: Path) -> dict:
    """Return `minimind.json` of an adapter folder. Raises UserError if it is not one."""
    recover_folder(folder)
    if not folder.exists():
        raise UserError(f"{folder} is not an adapter: there is no such folder; 4-lora_sft.py writes them")
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not an adapter of this toolkit: {DESCRIPTION} cannot be read ({error})") from None
    missing = {"base", "base_fingerprint", "config"} - set(description)
    if not missing and not isinstance(description["config"], dict):
        missing = {"config"}
    if missing:
        raise UserError(f"{folder / DESCRIPTION} has no {' and no '.join(sorted(missing))}")
    return description
