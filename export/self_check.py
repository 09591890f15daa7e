"""Check that an export computes what its source does: compare the logits of both on real text."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from common.errors import UserError
from common.files import read_lines
from export.huggingface import CONFIG, read_json, read_weights
from export.options import MAX_TEXTS
from model.architecture import VisionConfig
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import BOS_ID, EOS_ID, encode_texts
from model.weights_file import dtype_name

# Largest change of the predictions by a lower precision, in nats per token. Real models lose a tenth of that.
MAX_KL = {"f16": 1e-3, "float16": 1e-3, "bfloat16": 1e-2, "q8_0": 5e-2}

# The default text of the comparison: both languages, a chat, digits, code, rare characters.
SAMPLE_TEXTS = (
    "春天来了，河边的柳树长出了新的叶子，孩子们在草地上放风筝，老人坐在长椅上晒太阳。",
    "The library opens at nine in the morning; on rainy days the reading room is full before ten.",
    "北京是中华人民共和国的首都，有三千多年的历史，故宫和长城每年吸引许多游客。",
    "Water boils at 100 degrees Celsius at sea level, and at about 93 degrees on a mountain 2,000 metres high.",
    "请用简单的话解释什么是神经网络。\n神经网络由许多相连的小单元组成，通过例子调整连接的强弱来学习。",
    "user\nWhat is 17 + 25?\nassistant\n17 + 25 = 42, because 17 + 20 = 37 and 37 + 5 = 42.",
    "他说：“明天如果不下雨，我们就一起去爬山。”她笑了笑，没有回答。",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))  # 12",
    "元素周期表中，氢的原子序数是1，氧是8，铁是26，金是79。",
    "Once upon a time a small fox lived at the edge of a forest, and every evening it watched the lights of the town.",
    "人工智能 (AI) 在2024年继续发展，GPU 的价格上涨了约15%。",
    "naïve café, Straße, 東京, Привет, 🙂 and a tab\there.",
)


def sample_rows(tokenizer: PreTrainedTokenizerFast, path: Path | None, config: LMConfig) -> list[list[int]]:
    """Encode each line of a file (None: the built-in texts) as `<s>`text`</s>`, cut to the length of the training.

    For a model that sees, an image stands before each text.
    """
    texts = list(SAMPLE_TEXTS) if path is None else read_lines("--text", path)[:MAX_TEXTS]
    image_ids = config.vision.image_ids if config.vision is not None else ()
    return [[BOS_ID, *image_ids, *ids, EOS_ID][: config.max_seq_len] for ids in encode_texts(tokenizer, texts)]


def sample_image(vision: VisionConfig | None) -> dict[str, Tensor]:
    """Return the image that stands in every row for a model that sees, as an argument."""
    if vision is None:
        return {}
    return {"pixel_values": sample_pixels(vision.image_size)[None]}


def sample_pixels(size: int) -> Tensor:
    """Return a square picture, (3, size, size), with all values that pixels may have."""
    return torch.arange(3 * size * size).mul(7).remainder(256).view(3, size, size)


@torch.no_grad()
def model_logits(model: torch.nn.Module, rows: list[list[int]], image: dict[str, Tensor] | None = None) -> list[Tensor]:
    """Return the float32 logits (time, vocab_size) of each row of ids, one row at a time: nothing is padded.

    image: the image in every row, as an argument of the model; None: `sample_image`.
    """
    if image is None:
        image = sample_image(model.config.vision) if isinstance(model, Transformer) else {}
    return [model(input_ids=torch.tensor([row]), **image).logits[0].float() for row in rows]


def folder_logits(folder: Path, rows: list[list[int]]) -> list[Tensor]:
    """Compute the logits of an exported folder as its users will.

    `llama`: in float32 by transformers itself. `minimind`: in the stored precision by the code in the folder, in a process
    that has no access to this repository.
    """
    if is_minimind(folder):
        fields = read_json(folder / CONFIG).get("vision_config")
        return _logits_in_subprocess(folder, rows, sample_image(VisionConfig(**fields) if fields else None))
    return model_logits(load_stock(AutoModelForCausalLM, folder), rows)


def load_stock(auto_class: Any, folder: Path) -> torch.nn.Module:
    """Load an exported folder by an auto class of transformers, in float32 and without code in the folder.

    Raises UserError if transformers does not find exactly the weights it expects.
    """
    model, found = auto_class.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    errors = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
    if errors:
        raise UserError(f"transformers does not find the weights it expects in {folder}: {errors}")
    return model.eval()


_SUBPROCESS_CODE = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
import transformers
folder, task, result = sys.argv[1:]
task = json.load(open(task))
torch.set_num_threads(task["threads"])
image = load_file(task["image"])
auto = transformers.AutoModelForImageTextToText if image else transformers.AutoModelForCausalLM
model = auto.from_pretrained(folder, trust_remote_code=True, local_files_only=True, dtype="auto").eval()
with torch.no_grad():
    rows = [model(input_ids=torch.tensor([row]), **image).logits[0].float().contiguous() for row in task["rows"]]
save_file({str(i): row for i, row in enumerate(rows)}, result)
"""


def _logits_in_subprocess(folder: Path, rows: list[list[int]], sample: dict[str, Tensor]) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        task, image, result = (
            Path(scratch) / name for name in ("task.json", "image.safetensors", "logits.safetensors")
        )
        save_file(sample, image)
        task.write_text(json.dumps({"rows": rows, "threads": torch.get_num_threads(), "image": str(image)}))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", _SUBPROCESS_CODE, str(folder.resolve()), str(task), str(result)]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise UserError(f"the model in {folder} does not load on its own: {last[0]}")
        logits = read_weights(result)
    return [logits[str(i)] for i in range(len(rows))]


@dataclass
class Agreement:
    """Measured agreement of an export with its source.

    tokens: number of tokens compared.
    largest: largest difference of a logit from the source, its weights rounded as stored; above `tolerance` the export
        is wrong.
    rounding, kl: effect of storing a lower precision than the source's (None: the same precision): largest difference of
        a logit, and Kullback-Leibler divergence of the next token's distribution in nats per token. A mixture of experts
        may choose another expert after rounding, so there only the divergence is meaningful.
    """

    tokens: int
    largest: float
    tolerance: float
    rounding: float | None = None
    kl: float | None = None
    max_kl: float | None = None

    def describe(self) -> str:
        """Return the agreement as a line of text."""
        text = f"largest difference of logits over {self.tokens:,} tokens of real text: {self.largest:.2g}"
        text += f" (allowed: {self.tolerance:g})"
        if self.kl is not None:
            text += f"; the lower precision changes logits by up to {self.rounding:.2g} and the prediction of a token "
            text += f"by {self.kl:.2g} nats on average (allowed: {self.max_kl:g})"
        return text

    def check(self) -> None:
        """Raise UserError if the export must not be used."""
        if not self.largest <= self.tolerance:
            raise UserError(f"the export does not compute what its source does, so it was not kept: {self.describe()}")
        if self.kl is not None and not self.kl <= self.max_kl:
            raise UserError(
                f"too much is lost in this precision, so the export was not kept: {self.describe()}; use a higher --dtype"
            )


def measure(
    exported: list[Tensor], stored: list[Tensor], source: list[Tensor] | None, tolerance: float, max_kl: float | None
) -> Agreement:
    """Compare the logits of an export with those of its source, (time, vocab_size) for every row.

    stored: of the source, its weights rounded as the export stores them; source: None if nothing was rounded.
    """
    agreement = Agreement(sum(map(len, exported)), largest_difference(stored, exported), tolerance)
    if source is not None:
        agreement.rounding, agreement.kl = largest_difference(source, exported), kl_divergence(source, exported)
        agreement.max_kl = max_kl
    return agreement


def compare_folder(
    folder: Path, model: Transformer, rows: list[list[int]], tolerance: float | None = None
) -> Agreement:
    """Compare the logits of an exported folder, computed as its users will, with those of `model`, its source.

    tolerance: largest difference of a logit; None: 1e-4 for transformers' own code, which computes in float32, and 0 for
        ours, which computes in the stored precision.
    """
    ours = is_minimind(folder)
    dtype = getattr(torch, read_json(folder / CONFIG)["dtype"])
    stored = copy.deepcopy(model).to(dtype)
    reference = model_logits(stored if ours else stored.float(), rows)
    lossy = dtype not in (torch.float32, model.tok_embeddings.weight.dtype)
    source = model_logits(copy.deepcopy(model).float(), rows) if lossy else None
    if tolerance is None:
        tolerance = 0.0 if ours else 1e-4
    return measure(folder_logits(folder, rows), reference, source, tolerance, MAX_KL.get(dtype_name(dtype)))


def is_minimind(folder: Path) -> bool:
    """Return whether the folder runs our own code instead of an architecture of transformers."""
    return read_json(folder / CONFIG).get("model_type") == LMConfig.model_type


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest |a - b| over all logits of all rows; infinity if they cannot be compared."""
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or not b.isfinite().all():
            return float("inf")
        largest = max(largest, (a - b).abs().max().item())
    return largest


def kl_divergence(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return KL(ours || theirs) in nats per token, the mean over all positions."""
    total = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.log_softmax(-1), b.log_softmax(-1)
        total += (a.exp() * (a - b)).sum().item()
    return max(total, 0.0) / sum(map(len, ours))
