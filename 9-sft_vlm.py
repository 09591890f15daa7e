"""Stage 9, MiniMind-V: a vision-language model learns to answer questions about images.

    python 9-sft_vlm.py                                                 # from the newest out/pretrain_vlm_*.pth
    python 9-sft_vlm.py --data_path my_pictures.parquet --freeze middle --show_sample
    python 9-sft_vlm.py --resume                                        # continue a run that was stopped

In:  out/pretrain_vlm_{dim}[_moe].pth, and dataset/vlm_sft.parquet (conversations, image_bytes; made by python
     data_process.py vlm)
Out: out/sft_vlm_{dim}[_moe].pth and .json, .metrics.jsonl, .png and .resume/ as in 1-pretrain.py

As 3-full_sft.py, with images in the questions: `<image>` says where one stands, and a question may have several. Now the
language model is trained, too. With --freeze_encoder, or an encoder of its own folder, the features of every image are
computed once, and training reads them from the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.cli import as_word, flag, parse_options
from common.errors import UserError, run_script
from common.files import ROOT
from trainer.options import VisionOptions


@dataclass
class SftVlmOptions(VisionOptions):
    stage = "sft_vlm"

    data_path: list[Path] = flag(
        [ROOT / "dataset" / "vlm_sft.parquet"],
        "dialogues about images: Parquet, JSONL or JSON (default: dataset/vlm_sft.parquet)", nargs="+",
    )  # fmt: skip
    learning_rate: float = 1e-4
    freeze_encoder: bool = flag(
        False, "do not train our own image encoder; its features are then computed once (one of --vision_encoder is always "
        "frozen)",
    )  # fmt: skip
    batch_size: int = 16


def main() -> None:
    options = parse_options(SftVlmOptions, __doc__)

    # Imported here, because PyTorch takes seconds to load: --help and wrong flags are answered at once.
    from model.tokenizer import load_tokenizer
    from model.vision import VisionLanguageModel
    from trainer.distributed import cleanup_distributed, init_distributed
    from trainer.finetune import starting_model
    from trainer.losses import next_token_loss
    from trainer.recipe import require_files, weights_run
    from trainer.trainer import fit
    from trainer.vision import freeze, image_rows, open_encoder

    dist_env = init_distributed(options.device, options.timeout)

    # Model: one that was trained on captions.
    tokenizer = load_tokenizer(options.tokenizer)
    model, origin = starting_model(options, ["pretrain_vlm"], tokenizer, dist_env)
    if not isinstance(model, VisionLanguageModel):
        raise UserError(f"--init_from {options.init_from}: this model does not see; run 8-pretrain_vlm.py first")
    encoder = open_encoder(options, model, origin)
    frozen = freeze(model, options.freeze, options.freeze_encoder)
    run = weights_run(
        options, model.config, tokenizer, dist_env, origin, frozen, encoder=encoder.fingerprint if encoder else None
    )
    require_files(options.data_path, "make it with: python data_process.py vlm, or name one with --data_path")

    # Data: dialogues about images, with a mask over everything that the assistant does not say.
    frozen_own = origin if options.freeze_encoder and encoder is None else None
    train, val = image_rows(options, dist_env, tokenizer, model, encoder, frozen_own)

    # Loss: cross entropy of the next token of the assistant.
    fit(model, next_token_loss, train, val, options, run, dist_env)
    cleanup_distributed(dist_env)
    path = options.out_dir / f"{run.name}.pth"
    print(f"done: {path}; now try: python 2-eval.py --weights {as_word(path)} --image FILE")


if __name__ == "__main__":
    run_script(main)
