"""Write a MiniMind as a GGUF file for llama.cpp, Ollama and the programs built on them.

llama.cpp rotates interleaved pairs in all three architectures used here, as we do, so no rows are reordered:

dense                                               llama
mixture of experts, weights renormalised            ernie4_5-moe (any number of shared experts)
mixture of experts, weights not renormalised        deepseek (at least one shared expert)

The name of another architecture does no harm: llama.cpp only uses it to choose the computation.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, TokenType
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from export.huggingface import export_state
from export.self_check import MAX_KL, Agreement, measure, model_logits
from model.families import llama_names
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import SPLIT
from model.weights_file import build_model

# name: (type of the matrices, type recorded for the whole file)
TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
BLOCK = 32  # weights of a row that share a scale in q8_0


def gguf_architecture(config: LMConfig) -> str:
    """Return the llama.cpp architecture that computes what this model does. Raises UserError if there is none."""
    if config.qk_norm:
        raise UserError(
            "a model with qk_norm is not exported to GGUF; use --format minimind, or llama (it writes a Qwen3) if it has no "
            "shared experts"
        )
    if not config.use_moe:
        return "llama"
    if config.router_bias_rate:
        raise UserError("a model with router_bias_rate is not exported to GGUF; use --format llama or minimind")
    if config.renormalizes_top_k:
        return "ernie4_5-moe"
    if config.n_shared_experts and config.n_heads * config.head_dim == config.dim:
        return "deepseek"
    raise UserError(
        "llama.cpp has no architecture for this mixture of experts: its weights are not renormalised "
        f"(num_experts_per_tok {config.num_experts_per_tok}, norm_topk_prob {config.norm_topk_prob}), which deepseek "
        "can compute, but only with shared experts and without --head_dim; use --format llama or minimind"
    )


def gguf_names(config: LMConfig) -> dict[str, str | list[str]]:
    """Map GGUF's name of every tensor to ours, or to the list of ours that are stacked in it (experts)."""
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(architectures[gguf_architecture(config)], config.n_layers)
    names: dict[str, Any] = {}
    for ours, theirs in llama_names(config).items():
        name = table.get_name(re.sub(r"experts\.\d+\.", "experts.", theirs), try_suffixes=(".weight",))
        assert name is not None
        if "_exps." in name:
            names.setdefault(name, []).append(ours)
        else:
            names[name] = ours
    return names


def tensor_type(name: str, shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    """Return the type a tensor has in a file of type `kind`: small ones float32, rows that do not fill blocks float16."""
    wanted = TYPES[kind][0]
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return GGMLQuantizationType.F32
    if wanted == GGMLQuantizationType.Q8_0 and shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return wanted


def write_gguf(path: Path, model: Transformer, tokenizer: PreTrainedTokenizerFast, kind: str, name: str) -> None:
    """Write weights, vocabulary and chat template to one file.

    Args:
        kind: f32, f16 or q8_0 (8 bits and a scale for every 32 weights).
        name: the model's name, which programs show.

    Raises UserError for an architecture, a tokenizer or a weight that the file or llama.cpp cannot hold.
    """
    config = model.config
    if config.rope_scaling is not None:
        raise UserError(
            f"this model was trained with RoPE scaling ({config.rope_scaling['rope_type']}), which is not exported to "
            "GGUF; the formats llama and minimind have it"
        )
    architecture = gguf_architecture(config)
    # numpy has no bfloat16, so float32. The conversion to float16 reports weights that would overflow.
    state = export_state(model, torch.float32)
    if kind != "f32":
        export_state(model, torch.float16)
    writer = GGUFWriter(path, architecture)
    try:
        _add_settings(writer, config, architecture, kind, name)
        _add_vocabulary(writer, tokenizer, config)
        for theirs, ours in gguf_names(config).items():
            array = (state[ours] if isinstance(ours, str) else torch.stack([state[name] for name in ours])).numpy()
            stored = tensor_type(theirs, array.shape, kind)
            writer.add_tensor(theirs, gguf.quantize(array, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_settings(writer: GGUFWriter, config: LMConfig, architecture: str, kind: str, name: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    if config.head_dim * config.n_heads != config.dim:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if not config.use_moe:
        return
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.hidden_dim)
    writer.add_leading_dense_block_count(0)
    if architecture == "ernie4_5-moe":
        writer.add_interleave_moe_layer_step(1)
        if config.n_shared_experts:
            writer.add_expert_shared_feed_forward_length(config.hidden_dim * config.n_shared_experts)
    else:
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_scale(1.0)


def _add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, config: LMConfig) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    check_splitting(content)
    added = {token["id"]: token for token in content["added_tokens"]}
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    types = [TokenType.NORMAL] * len(tokens)
    for i, token in added.items():
        types[i] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)  # the chat template writes it
    writer.add_add_eos_token(False)
    # llama-cpp-python cannot parse the marks of what is trained on, and a prompt needs none.
    template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    writer.add_chat_template(template)


def check_splitting(content: dict) -> None:
    """Raise UserError unless llama.cpp splits text as this tokenizer (given as its JSON) does."""
    pieces = content.get("pre_tokenizer") or {}
    pieces = pieces.get("pretokenizers", [pieces])
    patterns = [piece["pattern"].get("Regex") for piece in pieces if piece.get("type") == "Split"]
    bytes_only = [piece for piece in pieces if piece.get("type") == "ByteLevel"]
    plain = len(bytes_only) == 1 and not (bytes_only[0]["use_regex"] or bytes_only[0]["add_prefix_space"])
    if content["model"]["type"] != "BPE" or content.get("normalizer") or patterns != [SPLIT] or not plain:
        raise UserError(
            "llama.cpp cannot split text as this tokenizer does: it must be a byte-level BPE with Qwen2's splitting, as "
            "train_tokenizer.py trains it; use --format llama or minimind"
        )


# ---- reading back


def read_gguf(path: Path, config: LMConfig) -> Transformer:
    """Read a GGUF file, dequantised to float32, into a model of `config`. Raises UserError if it does not fit."""
    state = {}
    names = gguf_names(config)
    for tensor in GGUFReader(path).tensors:
        if tensor.name not in names:
            raise UserError(f"{path}: unexpected tensor {tensor.name}")
        weight = _dequantize(tensor.data, tensor.tensor_type)
        ours = names[tensor.name]
        if isinstance(ours, str):
            state[ours] = weight
        else:
            state |= dict(zip(ours, weight.unbind(0), strict=True))
    return build_model(state, config, path)


def _dequantize(data: np.ndarray, kind: GGMLQuantizationType) -> Tensor:
    return torch.from_numpy(np.array(gguf.dequantize(data, kind), dtype=np.float32))


def round_to(model: Transformer, kind: str) -> Transformer:
    """Return `model` in float32 with its weights rounded as a file of type `kind` stores them, without a file."""
    state = export_state(model, torch.float32)
    for theirs, ours in gguf_names(model.config).items():
        for name in [ours] if isinstance(ours, str) else ours:
            stored = tensor_type(theirs, tuple(state[name].shape), kind)
            state[name] = _dequantize(gguf.quantize(state[name].numpy(), stored), stored)
    return build_model(state, model.config, f"{kind} of {model.config.dim}")


def compare_gguf(
    path: Path, model: Transformer, kind: str, rows: list[list[int]], tolerance: float | None = None
) -> Agreement:
    """Compare the logits of a file of type `kind`, read back into our model, with those of `model`, its source.

    This checks every bit of the file. That llama.cpp computes the same from it, the tests check.
    """
    read_back, stored = model_logits(read_gguf(path, model.config), rows), model_logits(round_to(model, kind), rows)
    source = model_logits(copy.deepcopy(model).float(), rows) if kind in MAX_KL else None
    return measure(read_back, stored, source, tolerance or 0.0, MAX_KL.get(kind))


# ---- Ollama

_MODELFILE = '''# ollama create {name} -f Modelfile && ollama run {name}
FROM ./{file}
TEMPLATE """{{{{- range .Messages }}}}{{{{ if eq .Role "system" }}}}{{{{ .Content }}}}{{{{ else }}}}<s>{{{{ .Role }}}}
{{{{ .Content }}}}</s>
{{{{ end }}}}{{{{ end }}}}<s>assistant
"""
PARAMETER stop "</s>"
PARAMETER stop "<s>"
PARAMETER num_ctx {context}
'''


def modelfile(file: str, name: str, config: LMConfig) -> str:
    """Return the Modelfile from which Ollama creates a model, with our chat format in Go's template language."""
    return _MODELFILE.format(file=file, name=name, context=config.max_seq_len)
