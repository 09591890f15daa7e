"""Export a model from the toolkit to transformers, vLLM, llama.cpp, Ollama, the Hugging Face Hub, or import it back.

    python export_model.py                                              # the newest weights, for plain transformers
    python export_model.py --weights out/rl_512.pth --lora out/lora_shop_512 --format minimind
    python export_model.py --format gguf --dtype q8_0 --push_to_hub me/my-minimind
    python export_model.py --format pth --weights out/rl_512-llama      # an exported folder into a .pth again

format    what loads it                                                       written
llama     transformers, vLLM, ... without code of ours: dense as Llama,       a folder: safetensors, configuration,
          mixture of experts as Ernie 4.5 MoE; with qk_norm as Qwen3 (MoE);   tokenizer with chat template
          one that sees through a CLIP as LLaVA (linear projector only)       and its CLIP
minimind  transformers with trust_remote_code=True: our names, our code       the same, and model.py with what it imports
gguf      llama.cpp, Ollama                                                   a folder: one .gguf, a Modelfile
onnx      onnxruntime (no KV cache: for scoring and short answers)            a folder: model.onnx, the tokenizer
pth       this toolkit                                                        the .pth and its .json

Every folder contains a model card (README.md) and minimind.json, which records how the weights were made. Each export is
loaded again, and its logits on real text are compared with those of the source: if they differ, nothing is kept.
"""

from __future__ import annotations

from common.cli import parse_options
from common.errors import exit_on_sigterm, run_script
from export.options import ExportOptions


def main() -> None:
    options = parse_options(ExportOptions, __doc__)
    exit_on_sigterm()  # `kill` removes temporary files, as Ctrl-C does

    import transformers  # heavy imports come after the command line is checked, so that --help is fast

    from export.exporter import check_output, export_folder, import_folder, upload
    from inference.model_finder import require_model
    from inference.model_loader import open_model

    transformers.utils.logging.disable_progress_bar()
    if options.format == "pth":
        result, agreement = import_folder(options.weights, options)
    else:
        check_output(options)
        path = options.weights
        if path is None and options.lora is None:
            path = require_model(options.out_dir, ["rlvr", "rl", "distill", "full_sft", "pretrain"], "1-pretrain.py")
        source, tokenizer = open_model(path, lora=options.lora, tokenizer=options.tokenizer)
        for note in source.notes:
            print(f"note: {note}")
        result, agreement = export_folder(source, tokenizer, options)
    print(f"{result}: {options.format}\n{agreement.describe()}")
    if options.push_to_hub:
        upload(result, options.push_to_hub, options.private)


if __name__ == "__main__":
    run_script(main)
