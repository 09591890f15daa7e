"""Convert a MiniMind for other libraries, and back: names, order of the rows, configurations, folders.

`llama` folders hold an architecture that transformers itself knows, so no code travels with them:

dense               LlamaForCausalLM; with `qk_norm` Qwen3ForCausalLM. They rotate feature i together with i + head_dim / 2
                    where we rotate pairs, so the rows of wq and wk are reordered: the scores, sums over a head's
                    features, stay the same.
mixture of experts  Ernie4_5_MoeForCausalLM: interleaved pairs like ours, softmax before the top-k, renormalised weights,
                    and shared experts that are simply added. Qwen2-MoE multiplies those by a sigmoid, which never
                    reaches 1; DeepSeek's routers do not renormalise (V2) or have no softmax (V3). With `qk_norm`
                    Qwen3MoeForCausalLM, which has no shared experts.

`minimind` folders hold the weights under our names and the few files of code that compute with them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.errors import UserError
from common.files import recover_folder, write_json
from model.families import (
    LLAMA_EMBEDDING,
    OUTPUT,
    from_llama_state,
    llama_names,
    rows_to_reorder,
    to_halves,
)
from model.LMConfig import FIELD_TYPES, LMConfig, architecture_differences
from model.model import Transformer
from model.remote_code import AUTO_MAP, PROCESSOR_AUTO_MAP, VISION_AUTO_MAP, copy_code
from model.rope import BETA_FAST, BETA_SLOW, yarn_ramp
from model.weights_file import Checkpoint, build_model, dtype_name, read_tensors, state_to_save

WEIGHTS, CONFIG, DESCRIPTION = "model.safetensors", "config.json", "minimind.json"
PROCESSOR = "processor_config.json"
LLAVA = "llava"  # the model type of what export/llava.py writes
TOKENIZER_CONFIG = "tokenizer_config.json"
ROUTER_BIAS = "model.layers.{}.mlp.moe_statics.e_score_correction_bias"  # Ernie's: zeros if ours has none
OUR_ROUTER_BIAS = "layers.{}.feed_forward.gate.bias"
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_YARN_DEFAULTS = {"beta_fast": BETA_FAST, "beta_slow": BETA_SLOW}
_NOT_COMPARED = {  # what a MiniMind may have otherwise, or `config_from_llama` reads itself
    "architectures", "intermediate_size", "rope_theta", "rope_parameters", "rope_scaling", "initializer_range",
    "attention_dropout", "use_cache", "router_aux_loss_coef", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
    "transformers_version",
}  # fmt: skip


def check_target(target: Path | str, overwrite: bool = False) -> None:
    """Raise UserError if an export must not be written to `target`: it exists, or is no export that may be replaced."""
    target = Path(target)
    recover_folder(target)
    if not target.exists():
        return
    if not overwrite:
        raise UserError(f"{target} exists; replace it with --overwrite, or choose another --output")
    if not target.is_dir() or (any(target.iterdir()) and not (target / DESCRIPTION).is_file()):
        raise UserError(f"{target} is not an exported model (no {DESCRIPTION} in it), so it is not replaced")


# ---- llama: names, rows, configuration


def stock_architecture(config: LMConfig) -> str:
    """Return the model type of transformers that computes what this model does. Raises UserError if there is none."""
    if not config.use_moe:
        return "qwen3" if config.qk_norm else "llama"
    if not config.qk_norm:
        return "ernie4_5_moe"
    if config.n_shared_experts or config.router_bias_rate:
        other = f"shared experts (n_shared_experts={config.n_shared_experts})"
        other = other if config.n_shared_experts else f"biases of routers (router_bias_rate={config.router_bias_rate})"
        raise UserError(f"transformers has no architecture with qk_norm and {other}; use --format minimind")
    return "qwen3_moe"


def to_llama_state(state: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Convert our state dict to the names and row order of the architecture of transformers."""
    kind, names = stock_architecture(config), llama_names(config)
    heads = {} if kind == "ernie4_5_moe" else rows_to_reorder(config)  # Ernie rotates pairs like us
    new = {
        theirs: to_halves(state[ours], heads[ours]) if ours in heads else state[ours] for ours, theirs in names.items()
    }
    if kind == "ernie4_5_moe":
        none = torch.zeros(config.n_routed_experts)
        biases = [state.get(OUR_ROUTER_BIAS.format(i), none) for i in range(config.n_layers)]
        new |= {ROUTER_BIAS.format(i): bias[None].clone() for i, bias in enumerate(biases)}
    return new


def from_stock_state(state: dict[str, Tensor], config: LMConfig, where: Path | str) -> dict[str, Tensor]:
    """Undo `to_llama_state`. Raises UserError for weights that a MiniMind does not have."""
    if stock_architecture(config) != "ernie4_5_moe":
        return from_llama_state(state, config, where)
    state = dict(state)
    biases = [state.pop(ROUTER_BIAS.format(i), None) for i in range(config.n_layers)]
    ours = from_llama_state(state, config, where, halves=False)
    if config.router_bias_rate:
        return ours | {OUR_ROUTER_BIAS.format(i): bias[0] for i, bias in enumerate(biases) if bias is not None}
    if any(bias is not None and bias.any() for bias in biases):
        raise UserError(
            f"{where}: the routers have biases (e_score_correction_bias), and a MiniMind has some only with "
            "router_bias_rate above 0"
        )
    return ours


def llama_config(config: LMConfig, dtype: torch.dtype) -> dict:
    """Return the `config.json` of the stock architecture that computes the same."""
    rope = {"rope_type": "default", "rope_theta": float(config.rope_theta), **(config.rope_scaling or {})}
    kind = stock_architecture(config)
    content = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": float(config.rope_theta),  # for transformers before 5, vLLM, llama.cpp
        "rope_parameters": rope,
        "initializer_range": config.initializer_range,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        **_token_ids(config),
        "dtype": dtype_name(dtype),
        "transformers_version": transformers.__version__,
    }
    if config.rope_scaling:
        content["rope_scaling"] = config.rope_scaling  # the older name, like rope_theta
    if kind != "llama":
        del content["mlp_bias"]
    if kind in ("qwen3", "qwen3_moe"):
        content["use_sliding_window"] = False
    if kind == "qwen3_moe":
        content |= {
            "moe_intermediate_size": config.hidden_dim,
            "num_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "norm_topk_prob": config.renormalizes_top_k,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": config.aux_loss_alpha,
        }
    if kind == "ernie4_5_moe":
        for name in ("attention_bias", "attention_dropout"):
            del content[name]
        content |= {
            "use_bias": False,
            "moe_intermediate_size": config.hidden_dim,
            "moe_num_experts": config.n_routed_experts,
            "moe_num_shared_experts": config.n_shared_experts,
            "moe_k": config.num_experts_per_tok,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": config.n_layers - 1,
            "moe_layer_interval": 1,
            # The weights are divided by max(their sum, this). Probabilities sum to 1 at most: with 1 nothing changes.
            "moe_norm_min": 1e-12 if config.renormalizes_top_k else 1.0,
            "router_aux_loss_coef": config.aux_loss_alpha,
        }
    return content


def config_from_llama(content: dict, where: Path | str) -> LMConfig:
    """Convert the `config.json` of one of `CLASSES` to an LMConfig. Raises UserError naming what a MiniMind cannot be."""
    kind = content.get("model_type", "llama")
    moe, ernie = kind.endswith("_moe"), kind == "ernie4_5_moe"
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    # Unknown settings (other ones of YaRN) stay in: LMConfig rejects them by name.
    scaling = {name: value for name, value in rope.items() if name not in ("rope_type", "type", "rope_theta")}
    scaling = {name: value for name, value in scaling.items() if _YARN_DEFAULTS.get(name) != value}
    try:
        fields = {
            "dim": content["hidden_size"],
            "n_layers": content["num_hidden_layers"],
            "n_heads": content["num_attention_heads"],
            "n_kv_heads": content.get("num_key_value_heads") or content["num_attention_heads"],
            "head_dim": content.get("head_dim"),
            "qk_norm": kind.startswith("qwen3"),
            "tie_word_embeddings": content.get("tie_word_embeddings", ernie),
            "vocab_size": content["vocab_size"],
            "hidden_dim": content["moe_intermediate_size" if moe else "intermediate_size"],
            "norm_eps": content["rms_norm_eps"],
            "max_seq_len": content["max_position_embeddings"],
            "rope_theta": rope.get("rope_theta", content.get("rope_theta", 10000.0)),
            "rope_scaling": None if rope_type == "default" else {"rope_type": rope_type} | scaling,
            "use_moe": moe,
        }
        if ernie:
            fields |= {
                "num_experts_per_tok": content["moe_k"],
                "n_routed_experts": content["moe_num_experts"],
                "n_shared_experts": content["moe_num_shared_experts"],
                "norm_topk_prob": content["moe_norm_min"] < 1,
            }
        elif moe:
            fields |= {
                "num_experts_per_tok": content["num_experts_per_tok"],
                "n_routed_experts": content.get("num_experts") or content["num_local_experts"],
                "n_shared_experts": 0,
                "norm_topk_prob": content.get("norm_topk_prob", False),
            }
        if moe:  # they make no exception for top-1
            fields["norm_top1_prob"] = fields["norm_topk_prob"] and fields["num_experts_per_tok"] == 1
        config = LMConfig(**fields)
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, UserError) else f"{error!r:.200}"  # repr: "KeyError('vocab_size')"
        raise UserError(f"{where} cannot be used: {reason}") from error
    # Everything else must be what this model would be exported with. (-1: the last layer.)
    given = {"moe_layer_start_index": 1, "moe_norm_min": 1e-12} | content
    if given.get("moe_layer_end_index") == -1:
        del given["moe_layer_end_index"]
    expected = {name: value for name, value in llama_config(config, torch.float32).items() if name not in _NOT_COMPARED}
    wrong = [f"{name}: {given[name]}, not {x}" for name, x in expected.items() if given.get(name, x) not in (x, None)]
    if wrong:
        raise UserError(f"{where} cannot be converted to a MiniMind: {'; '.join(wrong)}")
    return config


def config_from_minimind(content: dict, qk_norm: bool, where: Path | str) -> LMConfig:
    """Convert the `config.json` of a MiniMind2 of April 2025 or a MiniMind-3, with the code of its authors, to an LMConfig.

    qk_norm: whether its weights have norms of queries and keys: only those of MiniMind-3.
    """
    moe = bool(content.get("use_moe"))
    kind = ("qwen3_moe" if moe else "qwen3") if qk_norm else "llama"
    config = config_from_llama({"tie_word_embeddings": True} | content | {"model_type": kind}, where)
    if moe and not qk_norm:
        names = ("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "norm_topk_prob")
        fields = {name: content[name] for name in names if name in content}
        config = _own_config(config.own_fields() | {"use_moe": True, "n_shared_experts": 1} | fields, Path(where))
    scaling = config.scaling
    # Their ramp of YaRN ends at the last pair at the latest, ours at twice that.
    if scaling and yarn_ramp(config.head_dim, config.rope_theta, scaling.original)[-1] != 1:
        raise UserError(
            f"{where} cannot be converted: with rope_theta={config.rope_theta:g} and {scaling.original} tokens its YaRN "
            "scales the last pairs otherwise than ours"
        )
    return config


# ---- writing folders


def write_llama(folder: Path, model: Transformer, tokenizer_dir: Path, dtype: torch.dtype, description: dict) -> None:
    """Write the files that plain transformers, vLLM and llama.cpp's converter read."""
    state = to_llama_state(export_state(model, dtype), model.config)
    write_folder(folder, llama_config(model.config, dtype), model.config, state, tokenizer_dir, description)


def write_minimind(
    folder: Path, model: Transformer, tokenizer_dir: Path, dtype: torch.dtype, description: dict
) -> None:
    """Write our weights with the code that runs them, for `trust_remote_code=True`."""
    vision = model.config.vision
    content = {
        "architectures": [type(model).__name__],
        "model_type": LMConfig.model_type,
        "auto_map": AUTO_MAP if vision is None else VISION_AUTO_MAP,
        **model.config.own_fields(),
        "dtype": dtype_name(dtype),
        "transformers_version": transformers.__version__,
    }
    copy_code(folder, vision is not None)
    if vision is not None:
        processor = {"processor_class": "VisionLanguageProcessor", "auto_map": PROCESSOR_AUTO_MAP}
        write_json(folder / PROCESSOR, processor | {"image_size": vision.image_size, "image_ids": [*vision.image_ids]})
    write_folder(folder, content, model.config, export_state(model, dtype), tokenizer_dir, description)


def export_state(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights by our names in `dtype`, the tied pair once. Raises UserError for what `dtype` cannot hold."""
    return {name: weight.contiguous() for name, weight in state_to_save(model, dtype, "the export").items()}


def describe(checkpoint: Checkpoint, dtype: str) -> dict:
    """Return the content of `minimind.json`: configuration and origin of the weights, without paths of this machine."""
    made = {key: value for key, value in checkpoint.info.items() if key not in ("config", "dtype", "fingerprint")}
    return {"config": checkpoint.config.own_fields(), "dtype": dtype, **_without_paths(made)}


def write_folder(
    folder: Path, content: dict, config: LMConfig, state: dict[str, Tensor], tokenizer_dir: Path, description: dict
) -> None:
    """Write the files that every exported folder has. content: of `config.json`; state: the weights under their names."""
    write_json(folder / CONFIG, content)
    version = {"transformers_version": transformers.__version__}
    write_json(folder / "generation_config.json", _token_ids(config) | version)
    write_json(folder / DESCRIPTION, description)
    copy_tokenizer(tokenizer_dir, folder)
    # Bytes first, written here: the library's own writer turns a full disk into an error without its number.
    (folder / WEIGHTS).write_bytes(save(state, metadata={"format": "pt"}))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, and say which inputs models take: transformers 4 would add `token_type_ids`."""
    config = read_json(source / TOKENIZER_CONFIG)
    write_json(folder / TOKENIZER_CONFIG, {"model_input_names": ["input_ids", "attention_mask"]} | config)
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    if (template := source / "chat_template.jinja").is_file():
        shutil.copyfile(template, folder / template.name)


def _token_ids(config: LMConfig) -> dict:
    return {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def _without_paths(value: Any) -> Any:
    """Return a copy in which absolute paths are cut to their last part: they are private."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


# ---- reading folders


def read_folder(folder: Path | str) -> Checkpoint:
    """Read the model of an exported folder in its stored precision: `llama`, `minimind`, or of a later MiniMind.

    transformers may have saved the folder again after more training. Raises UserError for anything that is missing,
    damaged, unexpected, or not part of a MiniMind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name one that export_model.py made (llama or minimind)")
    content = read_json(folder / CONFIG)
    kind = content.get("model_type")
    description = read_json(folder / DESCRIPTION) if (folder / DESCRIPTION).exists() else {}
    if kind == LLAVA:
        raise UserError(
            f"{folder} is a MiniMind-V as a LLaVA, which is for other programs: use the .pth it was made from"
        )
    if kind != LMConfig.model_type and kind not in CLASSES:
        raise UserError(f"{folder / CONFIG}: a {kind} is not an export of a MiniMind (minimind, {', '.join(CLASSES)})")
    state = read_weights(folder / WEIGHTS)
    if kind in CLASSES:
        config = config_from_llama(content, folder / CONFIG)
    elif LLAMA_EMBEDDING in state:
        qk_norm = "model.layers.0.self_attn.q_norm.weight" in state
        config = config_from_minimind(content, qk_norm, folder / CONFIG)
    else:
        config = _own_config({name: content[name] for name in FIELD_TYPES if name in content}, folder / CONFIG)
    if "config" in description:  # also has what is not the architecture: dropout, initialisation, ...
        described = _own_config(description["config"], folder / DESCRIPTION)
        # Where it makes no difference (top-1 is rarely renormalised) a stock configuration does not have the fields.
        if config.use_moe and config.renormalizes_top_k == described.renormalizes_top_k:
            config.router_bias_rate = described.router_bias_rate
            config.norm_topk_prob, config.norm_top1_prob = described.norm_topk_prob, described.norm_top1_prob
        if differences := architecture_differences(config, described):
            raise UserError(f"{folder}: {CONFIG} and {DESCRIPTION} differ: {', '.join(differences)}")
        config = described

    if kind in CLASSES:
        state = from_stock_state(state, config, folder / WEIGHTS)
    elif LLAMA_EMBEDDING in state:
        state = from_llama_state(state, config, folder / WEIGHTS)
    elif config.tie_word_embeddings:
        state.pop(OUTPUT, None)
    if len({weight.dtype for weight in state.values()}) > 1:
        raise UserError(f"{folder / WEIGHTS}: weights of several precisions; save them in one")
    model = build_model(state, config, folder / WEIGHTS)
    info = {key: value for key, value in description.items() if key not in ("config", "dtype")}
    return Checkpoint(model, config, info, folder, fingerprint="")


def _own_config(fields: dict, where: Path) -> LMConfig:
    try:
        return LMConfig(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: this configuration cannot be used: {error}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or the pytorch_model.bin in its place. Raises UserError if it is missing or damaged."""
    if not path.exists() and (old := path.with_name("pytorch_model.bin")).is_file():
        return read_tensors(old)
    _check_exists(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut off ({error}); copy it again") from error


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises UserError if it is missing or damaged."""
    _check_exists(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it is not a JSON object); copy it again")
    return content


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise UserError(
            f"no {path.name} in {path.parent}: this is not a folder in the format of transformers (llama or minimind), "
            "or a part of it is missing"
        )
