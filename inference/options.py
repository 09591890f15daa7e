"""Options of everything that generates text, declared once: how tokens are chosen, which model is used, where it runs.

The flags of the scripts are derived from these dataclasses; the server's requests and the web page fill them.
Nothing here imports torch: `--help` and the clients of a server need no more than this.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import FlagSpec, flag, option_group, range_errors
from common.errors import UserError
from common.files import ROOT
from model.architecture import TOKENIZER_DIR

COMPILE = ("auto", "on", "off")
QUANTIZATIONS = ("none", "int8")
DTYPES = ("auto", "bfloat16", "float16", "float32")
MAX_LOGPROBS = 20  # alternatives that can be reported for each token: OpenAI's limit


@dataclass(frozen=True)
class SamplingParams:
    """Choose how tokens are sampled, and when to stop. The defaults are greedy: always the most probable token.

    A field's metadata has its `help` and, for numbers, its `limits`: `min`, `above` (exclusive), `max`. Fields without a
    help text are no flags.

    Nucleus sampling (`top_p`) is https://arxiv.org/abs/1904.09751; it counts the tokens that `top_k` leaves. `min_p` is
    https://arxiv.org/abs/2407.01082. `repetition_penalty` (https://arxiv.org/abs/1909.05858) divides positive logits and
    multiplies negative ones.

    `logprobs` reports the log-probability of each new token and of that many of the most probable tokens; 0: of the new
    token only; None: nothing. These are the model's own (log-softmax of its logits), before temperature, limits and
    penalties, as OpenAI-style servers report them: the other fields do not change them.

    `logit_bias` adds a number to the logits of some tokens. `constraint` is a grammar that the answer follows.
    """

    max_new_tokens: int = flag(256, "maximum length of an answer in tokens", min=1)
    temperature: float = flag(
        0.0, "divides the logits: 0 always takes the most probable token (greedy), 1 samples from the model's own "
        "distribution, more is more random", min=0,
    )  # fmt: skip
    top_k: int = flag(0, "sample from the K most probable tokens only; 0: no limit", min=0)
    top_p: float = flag(
        1.0, "sample from the most probable tokens that together have this probability; 1: no limit", above=0, max=1
    )
    min_p: float = flag(
        0.0, "leave out tokens whose probability is below this share of the highest one; 0: no limit", min=0, max=1
    )
    repetition_penalty: float = flag(
        1.0, "above 1: tokens of the prompt and of the answer become less probable; 1: none", above=0
    )
    presence_penalty: float = flag(
        0.0, "subtracted from the logit of every token that the answer already has", min=-math.inf
    )
    frequency_penalty: float = flag(
        0.0, "subtracted for every time that the answer already has the token", min=-math.inf
    )
    seed: int | None = flag(None, "the same seed gives the same text (default: a new one each time)", min=0)
    stop: tuple[str, ...] = flag((), "end before this text appears; repeatable", action="append", metavar="TEXT")
    logprobs: int | None = dataclasses.field(default=None, metadata={"limits": {"min": 0, "max": MAX_LOGPROBS}})
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    constraint: Any = None  # an inference.constraints.Constraint

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if errors := self.validate():
            raise UserError("; ".join(errors))

    def validate(self) -> list[str]:
        """Return everything that is wrong, each in words that name the flag."""
        errors = range_errors(self, vars(self))
        if not all(isinstance(text, str) and text for text in self.stop):
            errors.append("--stop must not be empty")
        if not all(math.isfinite(bias) for bias in self.logit_bias.values()):
            errors.append("--logit_bias must have finite numbers")
        return errors

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def truncates(self) -> bool:
        """Return whether some tokens are left out, which needs them sorted by their probability."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def kind(self) -> tuple:
        """Return a key: rows of the same kind run the same operations, with numbers of their own."""
        if self.greedy:
            return (True, self.has_penalties)
        return (False, self.has_penalties, self.top_k, self.truncates, self.top_p < 1)


@dataclass
class ModelOptions:
    """Choose the model that generates, and where and how it runs."""

    weights: Path | None = flag(
        None, "a .pth file, the folder of an adapter, or an exported folder (default: the newest suitable model in OUT_DIR)",
        metavar="PATH",
    )  # fmt: skip
    out_dir: Path = flag(ROOT / "out", "folder to look for models in (default: out)")
    tokenizer: Path = flag(TOKENIZER_DIR, "tokenizer folder (default: the one shipped in model/)")
    max_seq_len: int | None = flag(
        None, "length of prompt and answer together (default: the length the model was trained at; answers beyond it are "
        "poor)", min=2, metavar="TOKENS",
    )  # fmt: skip
    rope_scaling: str = flag(
        "none", "how positions beyond the trained length are brought within it: none, linear, ntk, yarn, or with a factor, "
        "such as yarn:4 (default: none; without a factor as little as each text needs, up to --max_seq_len). Shorter "
        "texts are not changed", metavar="METHOD[:FACTOR]",
    )  # fmt: skip
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = flag("auto", "precision of the computation; auto: bfloat16 where the hardware has it", choices=DTYPES)
    compile: str = flag(
        "auto", "fast decoding; auto: on a CPU with a C++ compiler, which takes seconds to start; on: also by "
        "torch.compile, which takes a minute; off: call the model itself", choices=COMPILE,
    )  # fmt: skip
    quantize: str = flag(
        "none", "int8: decode with the weights rounded to 8 bits, which is faster and a little less accurate",
        choices=QUANTIZATIONS,
    )  # fmt: skip


@dataclass
class ChatOptions:
    """Choose how much of a conversation the model sees."""

    system: str | None = flag(None, "a system message, which stands before everything", metavar="TEXT")
    history_turns: int = flag(5, "how many earlier questions, with their answers, the model sees", min=0, metavar="N")
    tools: list[str] | None = flag(
        None, "let the model call tools, which run on this machine: calculator, calendar, unit_converter, lookup, or a "
        "function of yours as module:function; without a name the calculator (default: none)", nargs="*", metavar="NAME",
    )  # fmt: skip


def sampling_options(**defaults: Any) -> Any:
    """Return a dataclass field `sampling: SamplingParams` of a script; `defaults` replace some of its defaults."""
    return option_group(SamplingParams, "how tokens are chosen", **defaults)


def sampling_flags() -> dict[str, FlagSpec]:
    """Return the numbers of `SamplingParams` for a `flag_group`, which keeps apart what was given and what was not."""
    hints = typing.get_type_hints(SamplingParams)
    helps = {field.name: field.metadata.get("help") for field in dataclasses.fields(SamplingParams)}
    return {name: (hints[name], help) for name, help in helps.items() if help and name != "stop"}


def model_options() -> Any:
    """Return a dataclass field `model: ModelOptions` of a script."""
    return option_group(ModelOptions, "the model")
