"""Options of the scripts that generate text, declared once: which model, where it runs, how tokens are chosen.

Nothing here imports torch: `--help` and clients of a server need no more than this.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import ROOT
from model.architecture import TOKENIZER_DIR

COMPILE = ("auto", "on", "off")
QUANTIZATIONS = ("none", "int8")
DTYPES = ("auto", "bfloat16", "float16", "float32")
MAX_LOGPROBS = 20  # alternatives that can be reported for each token: OpenAI's limit


@dataclass(frozen=True)
class SamplingParams:
    """How the next tokens are chosen, and when to stop. The defaults are greedy: always the likeliest token.

    Args:
        max_new_tokens: end after so many tokens.
        temperature: divides the logits; below 1 bolder differences, above 1 flatter; 0 is greedy.
        top_k: choose among the k likeliest tokens only; 0 for no limit.
        top_p: choose among the likeliest tokens that together have at least this probability (nucleus sampling,
            https://arxiv.org/abs/1904.09751), counted after top_k; 1 for no limit.
        min_p: leave out tokens less likely than this share of the likeliest (https://arxiv.org/abs/2407.01082).
        repetition_penalty: makes all tokens of the prompt and the answer less likely: positive logits are divided by
            it, negative ones multiplied (https://arxiv.org/abs/1909.05858); 1 changes nothing.
        presence_penalty: subtracted from the logit of every token that the answer has already.
        frequency_penalty: the same, times how often the answer has it.
        seed: of the random choices; the same seed gives the same choices whatever else is decoded at that time. None:
            a new one each time.
        stop: end before any of these texts appears.
        logprobs: report the log-probability of each new token and of so many of the likeliest tokens, at most
            `MAX_LOGPROBS`; 0: of the new token only; None: report nothing. These are the model's own (log-softmax of
            its logits), before temperature, limits and penalties, as OpenAI-style servers report them: the same
            whatever the other fields say.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        errors = self.validate()
        if errors:
            raise ValueError("; ".join(errors))

    def validate(self) -> list[str]:
        """Everything that is wrong, each in words that name the flag."""
        found = []
        if self.max_new_tokens < 1:
            found.append(f"--max_new_tokens {self.max_new_tokens} must be at least 1")
        if self.top_k < 0:
            found.append(f"--top_k {self.top_k} must not be negative (0: no limit)")
        # Written so that NaN is refused too.
        if not 0 <= self.temperature < math.inf:
            found.append(f"--temperature {self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            found.append(f"--top_p {self.top_p} must be above 0 and at most 1 (1: no limit)")
        if not 0 <= self.min_p <= 1:
            found.append(f"--min_p {self.min_p} must be between 0 and 1 (0: no limit)")
        if not 0 < self.repetition_penalty < math.inf:
            found.append(f"--repetition_penalty {self.repetition_penalty} must be above 0 (1: none)")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                found.append(f"--{name} {getattr(self, name)} must be a number (0: none)")
        if self.seed is not None and self.seed < 0:
            found.append(f"--seed {self.seed} must not be negative")
        if not all(isinstance(text, str) and text for text in self.stop):
            found.append("--stop must not be empty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            found.append(f"--logprobs {self.logprobs} must be between 0 and {MAX_LOGPROBS}")
        return found

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def sorts(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def kind(self) -> tuple:
        """Rows of the same kind run the same operations, with numbers of their own."""
        if self.greedy:
            return (True, self.penalises)
        return (False, self.penalises, self.top_k, self.sorts, self.top_p < 1)


# name: (type, help); the defaults are those of Sampling, unless a script has its own.
_FLAGS = {
    "max_new_tokens": (int, "length of an answer in tokens, at most"),
    "temperature": (float, "0: always the likeliest token (greedy); 1: as the model says; above: more surprising"),
    "top_k": (int, "choose among the K likeliest tokens; 0: no limit"),
    "top_p": (float, "choose among the likeliest tokens that together have this probability; 1: no limit"),
    "min_p": (float, "leave out tokens less likely than this share of the likeliest; 0: no limit"),
    "repetition_penalty": (float, "above 1: tokens of the prompt and the answer become less likely"),
    "presence_penalty": (float, "subtracted from the logit of every token that the answer has"),
    "frequency_penalty": (float, "the same, times how often the answer has it"),
    "seed": (int, "the same seed gives the same text (default: another one each time)"),
}


def add_sampling_flags(parser: argparse.ArgumentParser, **defaults) -> None:
    """Add a flag for every field of `SamplingParams` that shapes the text; `defaults` replace some of its defaults."""
    group = parser.add_argument_group("how tokens are chosen")
    for name, (kind, help) in _FLAGS.items():
        default = defaults.get(name, getattr(SamplingParams, name))
        help += "" if default is None else f" (default: {default})"
        group.add_argument(f"--{name}", type=kind, default=default, help=help)
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text appears; repeatable"
    )


def sampling_from_args(args: argparse.Namespace) -> SamplingParams:
    """The `SamplingParams` asked for. UserError naming every flag that is wrong."""
    try:
        return SamplingParams(**{name: getattr(args, name) for name in _FLAGS}, stop=tuple(args.stop))
    except ValueError as error:
        raise UserError(str(error)) from error


def add_model_flags(parser: argparse.ArgumentParser, stages: str) -> None:
    """Add the flags that say which model; `stages` says in words which checkpoint is the default."""
    group = parser.add_argument_group("the model")
    group.add_argument("--weights", type=Path, metavar="FILE", help=f"a .pth file (default: the newest {stages})")
    group.add_argument(
        "--out_dir", type=Path, default=ROOT / "out", help="folder to look for checkpoints in (default: out)"
    )
    group.add_argument(
        "--tokenizer", type=Path, default=TOKENIZER_DIR, help="tokenizer folder (default: the one shipped in model/)"
    )
    group.add_argument(
        "--max_seq_len", type=int, metavar="TOKENS",
        help="prompt and answer together (default: what the model was trained at; it writes badly beyond)",
    )  # fmt: skip
    group.add_argument(
        "--rope_scaling", default="none", metavar="METHOD[:FACTOR]",
        help="how positions beyond the trained length are brought within it: none, linear, ntk, yarn, or with a factor, "
        "such as yarn:4 (default: none; without a factor as little as each text needs, up to --max_seq_len). Shorter "
        "texts stay as they are",
    )  # fmt: skip
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    group.add_argument(
        "--dtype", default="auto", choices=DTYPES,
        help="precision of the computation; auto: bfloat16 where the hardware has it (default: auto)",
    )  # fmt: skip
    group.add_argument(
        "--compile", default="auto", choices=COMPILE,
        help="fast decoding; auto: where it takes seconds to start, by a C++ compiler on a CPU; on: also by torch.compile, "
        "which takes a minute; off: call the model itself (default: auto)",
    )  # fmt: skip
    group.add_argument(
        "--quantize", default="none", choices=QUANTIZATIONS,
        help="int8: decode with the weights rounded to 8 bits, which is faster and a little less exact (default: none)",
    )  # fmt: skip
