"""Write the model card of an export: what the model is, how it was trained, how to run it."""

from __future__ import annotations

from export.huggingface import stock_architecture
from export.self_check import Agreement
from model.model import Transformer, parameter_counts
from model.weights_file import Checkpoint

_CODE = {
    "llama": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{remote})
model = AutoModelForCausalLM.from_pretrained("{name}"{remote})
chat = [{{"role": "user", "content": "你好"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=200, do_sample=True, temperature=0.7, top_p=0.9)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```""",
    "vision": """```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", "{name}"{remote})
image = {{"type": "image", "url": "cat.png"}}
chat = [{{"role": "user", "content": [image, {{"type": "text", "text": "描述这张图片。"}}]}}]
print(pipe(chat, max_new_tokens=100, return_full_text=False)[0]["generated_text"])
```""",
    "gguf": """```sh
llama-cli -m {file} --jinja -cnv          # llama.cpp
ollama create {name} -f Modelfile && ollama run {name}
```""",
    "onnx": """```python
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
session = onnxruntime.InferenceSession("{name}/{file}")
chat = [{{"role": "user", "content": "你好"}}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
for _ in range(50):  # the whole text goes through the model for every token: there is no KV cache
    (logits,) = session.run(["logits"], {{"input_ids": np.array([ids])}})
    ids.append(int(logits[0, -1].argmax()))
    if ids[-1] == tokenizer.eos_token_id:
        break
print(tokenizer.decode(ids))
```""",
}
_STOCK = {"llama": "Llama", "qwen3": "Qwen3", "ernie4_5_moe": "Ernie 4.5 MoE", "qwen3_moe": "Qwen3 MoE"}
_INFO_ROWS = {
    "stage": "stage",
    "step": "optimizer steps",
    "tokens": "tokens trained on",
    "base": "adapter trained on",
    "train_data": "fingerprint of the data",
    "tokenizer_hash": "tokenizer",
}
_METRICS = ("loss", "bits_per_byte", "accuracy", "margin")  # not speed or memory
_OPTION_ROWS = (
    "data_path", "epochs", "batch_size", "accumulation_steps", "learning_rate", "optimizer", "dtype", "seed",
)  # fmt: skip


def model_card(
    name: str,
    checkpoint: Checkpoint,
    description: dict,
    export_format: str,
    agreement: Agreement,
    file: str = "",
    ceval: dict[str, str] | None = None,
) -> str:
    """Return the README.md of an export: Markdown with the header that Hugging Face reads.

    Args:
        name: the folder's name, or user/name where it is published.
        description: what `export.huggingface.describe` returns; the card shows nothing of the training beyond it.
        export_format: llama, minimind, gguf or onnx.
        file: name of the GGUF or ONNX file.
        ceval: the accuracy in C-Eval, of each group of subjects.
    """
    library = export_format if export_format in ("gguf", "onnx") else "transformers"
    sees = checkpoint.config.vision is not None
    task = "image-text-to-text" if sees else "text-generation"
    header = f"---\nlanguage:\n- zh\n- en\nlibrary_name: {library}\npipeline_tag: {task}\ntags:\n- minimind\n---"
    counts = parameter_counts(checkpoint.model)
    active = f", {counts['active'] / 1e6:.2f}M of them active per token" if checkpoint.config.use_moe else ""
    remote = ", trust_remote_code=True" if export_format == "minimind" else ""
    run_as = name.rsplit("/", 1)[-1] if export_format == "gguf" else name
    code = _CODE.get("vision" if sees else export_format, _CODE["llama"]).format(name=run_as, remote=remote, file=file)
    sections = [
        header,
        f"# {name}",
        f"A small Chinese and English {'vision-' * sees}language model of {counts['total'] / 1e6:.2f}M parameters{active}, "
        "trained from scratch with MiniMind. It is made for learning how language models work: its answers may be wrong.",
        "## Running it",
        code,
        *(
            ["Its own code needs transformers 5 or newer; exports in the llama format also load in 4.57."]
            if remote
            else []
        ),
        "The chat template is included, and writes chats as the model has seen them in training. It was trained at "
        f"{checkpoint.config.max_seq_len} tokens of context.",
        "## What it is",
        _table(_architecture(checkpoint.model, export_format)),
        "## How it was trained",
        _table(_training(description)) or "Nothing is recorded about the training of these weights.",
    ]
    if ceval:
        sections += ["## C-Eval", _table(ceval)]
    sections += ["## How close it is to its source", f"Checked when it was exported: {agreement.describe()}."]
    return "\n\n".join(sections) + "\n"


def _architecture(model: Transformer, export_format: str) -> dict:
    config = model.config
    name = _STOCK[stock_architecture(config)] if export_format == "llama" else "MiniMind"
    rows = {
        "architecture": f"LLaVA of a CLIP and {name}"
        if export_format == "llama" and config.vision is not None
        else name,
        "layers": config.n_layers,
        "width": config.dim,
        "query heads / key-value heads": f"{config.n_heads} / {config.n_kv_heads}",
        "feed-forward width": config.hidden_dim,
        "vocabulary": config.vocab_size,
        "context": config.max_seq_len,
        "rotary base": config.rope_theta,
        "embeddings": "input and output tied" if config.tie_word_embeddings else "input and output separate",
    }
    if (vision := config.vision) is not None:
        size = f"{vision.image_size} x {vision.image_size} pixels, " if vision.encoder == "vit" else "through a CLIP, "
        rows["images"] = f"{size}{len(vision.image_ids)} tokens each"
    if config.qk_norm:
        rows["queries and keys"] = "normalised in every head"
    if config.use_moe:
        weights = "renormalised" if config.renormalizes_top_k else "not renormalised"
        rows["experts"] = (
            f"{config.num_experts_per_tok} of {config.n_routed_experts} per token ({weights}), and shared ones of "
            f"{config.n_shared_experts} times the width"
        )
    return rows


def _training(description: dict) -> dict:
    rows = {label: description[key] for key, label in _INFO_ROWS.items() if description.get(key) is not None}
    for key, value in description.get("metrics", {}).items():
        if isinstance(value, (int, float)) and any(word in key for word in _METRICS):
            rows[key.replace("_", " ")] = f"{value:.4g}"
    options = description.get("options", {})
    for key in _OPTION_ROWS:
        if (value := options.get(key)) is not None:
            rows[f"--{key}"] = " ".join(map(str, value)) if isinstance(value, list) else value
    return rows


def _table(rows: dict) -> str:
    if not rows:
        return ""
    cells = [f"| {key} | {str(value).replace('|', '/')} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *cells])
