"""Train a small model to caption pictures, and watch when it begins to look: captions with the right image and a wrong one.

    python docs/experiments/vision.py

docs/vision.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(300, "optimizer steps", min=20)


def main() -> None:
    options = parse_options(Options, __doc__)
    import torch

    from data_pipeline.datasets import PackedRows
    from data_pipeline.image_features import Pixels
    from data_pipeline.tokenize_chats import tokenize_chat_data
    from model.architecture import VisionConfig
    from model.LMConfig import LMConfig
    from model.vision import VisionLanguageModel
    from trainer.losses import next_token_loss
    from trainer.vision import ImageRows, image_ids

    shape = dict(encoder="vit", width=64, image_size=48, patch_size=16, n_layers=2, n_heads=4)
    ids = image_ids(tiny.tokenizer(), 9)  # 3 x 3 patches
    vision = VisionConfig.complete(shape | {"image_ids": ids})
    torch.manual_seed(0)
    model = VisionLanguageModel(LMConfig(**tiny.SHAPE, vision_config=vision)).train()
    dataset = tokenize_chat_data(
        [tiny.SAMPLE / "vlm_pretrain.parquet"], tiny.tokenizer(), tiny.OUT / "cache",
        image_ids=ids, max_tokens=128,
    )  # fmt: skip
    pixels = Pixels(dataset, 48)
    rows, val = (ImageRows(PackedRows(dataset, part, 128, 0), pixels, "pixel_values") for part in dataset.split(0.05))
    batch = val.batch(range(min(24, len(val))))
    images = batch.inputs["pixel_values"]
    seen = {"the right image": images, "another image": images.roll(1, 0), "a grey image": torch.full_like(images, 127)}
    curves = {name: [] for name in seen}

    def look(step: int) -> None:
        if step % 20 and step > 1:
            return
        model.eval()
        for name, given in seen.items():
            inputs = batch.inputs | {"pixel_values": given}
            with torch.no_grad():
                loss = float(next_token_loss(model, dataclasses.replace(batch, inputs=inputs))[2]["loss"])
            curves[name].append((step, loss / batch.n_targets))
        model.train()

    tiny.train(model, rows, options.steps, 6e-3, optimizer="muon", batch_size=4, each_step=look)
    tiny.table("image, loss of a held-out caption at the end", [(name, curve[-1][1]) for name, curve in curves.items()])

    def draw(axes) -> None:
        for name, curve in curves.items():
            axes.plot(*zip(*curve, strict=True), label=name)
        axes.set(xlabel="optimizer step", ylabel="loss of held-out captions (nats per token)", ylim=(0, None))
        axes.legend(frameon=False, title="the model sees")

    tiny.plot(options.output, __file__, draw)


if __name__ == "__main__":
    run_script(main)
