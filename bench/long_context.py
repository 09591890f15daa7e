"""Measure perplexity beyond the trained length, without and with RoPE scaling, by position.

    python bench/long_context.py --weights out/pretrain_512.pth --data_path held_out.jsonl
    python bench/long_context.py --weights out/pretrain_512.pth --data_path held_out.jsonl --join 200 --documents 16

Long documents of --data_path are read from their start, in one pass for every length: 1,024, 2,048, ... tokens. The table
gives the perplexity (and the bits per byte) of the second half of each, so that every token is counted once, at the
shortest length that contains it. Give texts that the model was not trained on. If they are shorter than the longest
length, --join N joins the texts of at least N characters, in the order of the file, and the output says so: a model can
gain little from distant parts of such a text, but it can be disturbed by them.

`last 512 only` is what a chat does without long contexts: the same tokens, predicted from a window of the trained length
that moves forward by half its length. A method is useful if it beats this column, not only `none`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.cli import Parser  # noqa: E402
from common.errors import UserError, run_script
from data_pipeline.readers import iter_records
from model.architecture import ROPE_SCALING_METHODS
from model.device import resolve_device, resolve_dtype
from model.model import Transformer
from model.tokenizer import BOS_ID, encode_text, load_tokenizer
from model.weights import load_checkpoint


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="a .pth file")
    parser.add_argument("--data_path", type=Path, required=True, help="texts it was not trained on (JSONL, CSV, TXT)")
    parser.add_argument("--text_field", default="text", help="column or key with the text (default: text)")
    parser.add_argument("--join", type=int, metavar="CHARS", help="join texts of at least this many characters")
    parser.add_argument("--documents", type=int, default=8, help="number of long documents (default: 8)")
    parser.add_argument("--longest", type=int, default=8, help="in trained lengths, a power of two (default: 8)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    tokenizer, device = load_tokenizer(), resolve_device(args.device)
    checkpoint = load_checkpoint(args.weights, device, resolve_dtype("auto", device), tokenizer)
    model, trained = checkpoint.model, checkpoint.config.max_seq_len
    longest = trained * args.longest
    documents = read_documents(args, tokenizer, longest)
    n_bytes = bytes_per_token(tokenizer).to(device)

    joined = f"texts of {args.join} characters and more, joined" if args.join else "whole texts"
    print(f"{args.weights}: trained at {trained} tokens; {len(documents)} documents of {longest} tokens ({joined})\n")
    names = [f"last {trained} only", "none", *ROPE_SCALING_METHODS]
    print(f"| tokens | context | {' | '.join(names)} |\n|{'---|' * (2 + len(names))}")
    length = trained
    while length <= longest:
        first = length // 2 if length > trained else 0  # of the counted tokens, without <s>
        sums = [
            score(model, documents, n_bytes, first, length, name) for name in names[: 2 if length == trained else 9]
        ]
        cells = [cell(*each) for each in sums] + ["as none"] * (len(names) - len(sums))
        print(f"| {first + 1:,} to {length:,} | {length:,} | {' | '.join(cells)} |", flush=True)
        length *= 2
    forced = [score(model, documents, n_bytes, 0, trained, name, args.longest) for name in ROPE_SCALING_METHODS]
    cells = ["", "", *(cell(*each) for each in forced)]
    print(f"| 1 to {trained:,}, scaled {args.longest} times nevertheless | {trained:,} | {' | '.join(cells)} |")


def read_documents(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, longest: int) -> list[Tensor]:
    """Return the first texts that are long enough, as ids (longest,) that start with <s>."""
    found: list[Tensor] = []
    for text in long_texts(args, tokenizer, longest):
        found.append(torch.tensor([BOS_ID, *encode_text(tokenizer, text)][:longest]))
        if len(found) == args.documents:
            return found
    if not found:
        raise UserError(f"{args.data_path} has no text of {longest} tokens: join shorter ones with --join 200")
    return found


def long_texts(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, longest: int) -> Iterator[str]:
    parts: list[str] = []
    for row in iter_records(args.data_path, on_bad=None):
        text = row.data.get(args.text_field)
        if not isinstance(text, str) or len(text) < (args.join or 1):
            continue
        parts = [*parts, text] if args.join else [text]
        joined = "\n".join(parts)
        # A text never has more tokens than bytes: texts that are too short need not be encoded.
        if len(joined.encode()) >= longest and len(encode_text(tokenizer, joined)) >= longest:
            parts = []
            yield joined


def bytes_per_token(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return the number of UTF-8 bytes of every token (vocab,): a byte-level vocabulary writes each as one character."""
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    return torch.tensor([0 if i in special else len(name) for i, name in enumerate(names)])


@torch.inference_mode()
def score(
    model: Transformer,
    documents: list[Tensor],
    n_bytes: Tensor,
    first: int,
    length: int,
    name: str,
    forced: float | None = None,
) -> tuple[float, int, int]:
    """Return nats, tokens and bytes of the tokens from `first` to `length` of every document, with the method `name`.

    forced: scale by this factor, whatever the length.
    """
    trained, nats, tokens, size = model.config.max_seq_len, 0.0, 0, 0
    scaling = None
    if name in ROPE_SCALING_METHODS:
        factor = forced or length / trained
        dynamic = model.config.dynamic_rope_scaling(name, factor)
        scaling = dynamic.scaling(dynamic.trained_factor * factor)
    for document in documents:
        ids = document[:length].to(n_bytes.device)
        begin = max(first, 1)  # <s> is given
        if name.startswith("last"):
            spans = [(max(end - trained, 0), end) for end in range(trained, length + 1, trained // 2)]
        else:
            spans = [(0, length)]
        for start, end in spans:
            losses = token_losses(model, ids[start:end], scaling)  # of tokens start + 1 ... end - 1
            counted = losses[max(begin - start - 1, 0) :]
            begin = max(begin, end)
            nats += counted.sum().item()
            tokens += len(counted)
            size += n_bytes[ids[end - len(counted) : end]].sum().item()
    return nats, tokens, size


def token_losses(model: Transformer, ids: Tensor, scaling) -> Tensor:
    """Return the nats (time - 1,) of every token but the first."""
    logits = model(ids[None], use_cache=False, rope_scaling=scaling).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none")


def cell(nats: float, tokens: int, size: int) -> str:
    return f"{math.exp(nats / tokens):.1f} ({nats / math.log(2) / size:.3f})"


if __name__ == "__main__":
    run_script(main)
