"""Stage 8, MiniMind-V: a model that answers learns to see, from images with captions.

    python 8-pretrain_vlm.py                                                    # from the newest out/full_sft_*.pth
    python 8-pretrain_vlm.py --vision_encoder clip-vit-base-patch32             # a frozen image model, from its folder
    python 8-pretrain_vlm.py --data_path dataset/sample/vlm_pretrain.parquet    # drawn scenes, to try it
    python 8-pretrain_vlm.py --resume                                           # continue a run that was stopped

In:  out/full_sft_{dim}[_moe].pth, and dataset/vlm_pretrain.parquet (conversations, image_bytes; made by python
     data_process.py vlm)
Out: out/pretrain_vlm_{dim}[_moe].pth and .json, .metrics.jsonl, .png and .resume/ as in 1-pretrain.py; the folder of
     --vision_encoder is not copied

An image becomes features, one for each patch of it, and a projector makes them as wide as embeddings. In the prompt they
take the place of the tokens that stand for the image: for the Transformer, an image is a few dozen more words. The loss is
that of 3-full_sft.py. The language model stays as it is at first (--freeze language): the projector, and the encoder if it
is our own small one, learn to say what they see in its words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from common.cli import as_word, flag, parse_options
from common.errors import run_script
from common.files import ROOT
from model.architecture import VisionConfig
from trainer.options import VisionOptions


@dataclass
class PretrainVlmOptions(VisionOptions):
    stage = "pretrain_vlm"

    data_path: list[Path] = flag(
        [ROOT / "dataset" / "vlm_pretrain.parquet"],
        "images with captions: Parquet, JSONL or JSON (default: dataset/vlm_pretrain.parquet)", nargs="+",
    )  # fmt: skip
    learning_rate: float = 4e-4
    freeze: str = "language"
    vision_encoder: Path | None = flag(
        None, "folder of an image model (CLIP, SigLIP, DINOv2, ViT, ConvNeXt, ...) that makes features of the images "
        "(default: a small encoder of our own is trained)", metavar="FOLDER",
    )  # fmt: skip
    projector: str = flag(
        "mlp", "linear as in the first MiniMind-V, or mlp as in later ones", choices=["linear", "mlp"]
    )
    image_size: int = flag(48, "our own encoder: side of an image in pixels; others are resized to it", min=1)
    patch_size: int = flag(16, "our own encoder: side of a patch in pixels, a power of two", min=2)
    vision_width: int = flag(128, "our own encoder: width", min=1)
    vision_layers: int = flag(2, "our own encoder: number of layers", min=1)
    vision_heads: int = flag(4, "our own encoder: number of heads", min=1)

    def own_encoder(self) -> VisionConfig:
        """Return what the flags say about our own encoder; the tokens that stand for an image are still to be chosen."""
        config = VisionConfig(
            encoder="vit", width=self.vision_width, projector=self.projector, image_size=self.image_size,
            patch_size=self.patch_size, n_layers=self.vision_layers, n_heads=self.vision_heads,
        )  # fmt: skip
        return replace(config, image_ids=(0,) * max(config.n_patches, 1))

    def validate(self) -> list[str]:
        found = super().validate() + self.own_encoder().errors(1)
        for name in ("image_size", "patch_size", "vision_width", "vision_layers", "vision_heads"):
            if self.vision_encoder is not None and getattr(self, name) != getattr(PretrainVlmOptions, name):
                found.append(f"--{name} is for our own encoder and does nothing with --vision_encoder: leave it out")
        return found


def main() -> None:
    options = parse_options(PretrainVlmOptions, __doc__)

    # Imported here, because PyTorch takes seconds to load: --help and wrong flags are answered at once.
    from model.model import describe_parameters
    from model.tokenizer import load_tokenizer
    from trainer.distributed import cleanup_distributed, init_distributed
    from trainer.finetune import starting_model
    from trainer.losses import next_token_loss
    from trainer.recipe import require_files, weights_run
    from trainer.trainer import fit
    from trainer.vision import add_vision, freeze, image_rows, load_encoder, new_vision_config

    dist_env = init_distributed(options.device, options.timeout)

    # Model: one that answers, with an encoder and a projector of random weights.
    tokenizer = load_tokenizer(options.tokenizer)
    text_model, origin = starting_model(options, ["full_sft"], tokenizer, dist_env)
    encoder = load_encoder(options, options.vision_encoder) if options.vision_encoder is not None else None
    model = add_vision(text_model, new_vision_config(options.own_encoder(), encoder, tokenizer), options.seed)
    frozen = freeze(model, options.freeze, encoder=False)
    print(f"with the vision part: {describe_parameters(model)}")
    run = weights_run(
        options, model.config, tokenizer, dist_env, origin, frozen, encoder=encoder.fingerprint if encoder else None
    )
    require_files(options.data_path, "make it with: python data_process.py vlm, or name one with --data_path")

    # Data: dialogues about images, with a mask over everything that the assistant does not say.
    train, val = image_rows(options, dist_env, tokenizer, model, encoder)

    # Loss: cross entropy of the next token of the assistant.
    fit(model, next_token_loss, train, val, options, run, dist_env)
    cleanup_distributed(dist_env)
    path = options.out_dir / f"{run.name}.pth"
    print(f"done: {path}; now try: python 9-sft_vlm.py --init_from {as_word(path)}")


if __name__ == "__main__":
    run_script(main)
