"""Measure what a model sees: questions about images it has not been trained on, by kind.

    python eval_vlm.py                                                  # the newest out/sft_vlm_*.pth, the sample's scenes
    python eval_vlm.py --weights out/sft_vlm_512.pth --data_path mine.parquet --vision_encoder clip-vit-base-patch32

In:  a vision-language model, and a Parquet or JSONL file whose rows have conversations, images, and perhaps a `kind`
Out: OUT_DIR/vlm/summary.json, and sheet.png, pictures with questions and answers

An answer counts if it is the expected one, word for word. A model that answers well may still not look: many answers can
be guessed. So every question is also asked without its image, and with the image of another question of its kind; the
right answers to these must not be more than chance, the most frequent answer to such questions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from common.cli import flag, parse_options
from common.errors import UserError, run_script
from common.files import ROOT, write_json
from model.architecture import TOKENIZER_DIR


@dataclass
class Options:
    weights: Path | None = flag(None, "a .pth file (default: the newest sft_vlm_*.pth in OUT_DIR)", metavar="FILE")
    out_dir: Path = flag(ROOT / "out", "folder of models, and of the results in vlm/ (default: out)")
    data_path: Path = flag(
        ROOT / "dataset" / "sample" / "vlm_heldout.parquet",
        "questions about images (default: dataset/sample/vlm_heldout.parquet)",
    )
    tokenizer: Path = flag(TOKENIZER_DIR, "tokenizer folder (default: the one shipped in model/)")
    vision_encoder: Path | None = flag(
        None,
        "folder of the image encoder, for a model without its own (default: that of its training)",
        metavar="FOLDER",
    )
    limit: int = flag(0, "ask only the first N questions of each kind; 0: all", metavar="N", min=0)
    sheet: int = flag(24, "pictures on the sheet", min=1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")


def main() -> None:
    options = parse_options(Options, __doc__)
    import torch  # takes seconds to import

    from evaluation.vlm import draw_sheet, evaluate, read_questions
    from inference.model_finder import require_model
    from inference.model_loader import describe_checkpoint, open_model
    from inference.vision import ImageProcessor
    from model.device import resolve_device

    path = options.weights or require_model(options.out_dir, ["sft_vlm"], "9-sft_vlm.py")
    device = resolve_device(options.device)
    checkpoint, tokenizer = open_model(path, tokenizer=options.tokenizer, device=device, dtype=torch.float32)
    print(describe_checkpoint(checkpoint))
    prepare = ImageProcessor.for_checkpoint(checkpoint, options.vision_encoder)
    questions = read_questions(options.data_path, options.limit)
    if not questions:
        raise UserError(f"{options.data_path} has no questions")
    results, answers = evaluate(prepare, tokenizer, questions)

    print(f"{'kind':<14} {'questions':>9} {'right':>7} {'chance':>7} {'no image':>9} {'wrong image':>12}")
    for kind, one in results.items():
        row = f"{kind:<14} {one.n:>9} {one.right:>7.1%} {one.chance:>7.1%} {one.without:>9.1%} {one.wrong:>12.1%}"
        print(row)
    folder = options.out_dir / (f"vlm_first_{options.limit}" if options.limit else "vlm")
    folder.mkdir(parents=True, exist_ok=True)
    draw_sheet(questions, answers, options.sheet, folder / "sheet.png")
    summary = {
        "weights": str(path),
        "data": str(options.data_path),
        "kinds": {k: asdict(r) for k, r in results.items()},
    }
    write_json(folder / "summary.json", summary)
    print(f"results: {folder / 'summary.json'}; pictures with answers: {folder / 'sheet.png'}")


if __name__ == "__main__":
    run_script(main)
