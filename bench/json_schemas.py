"""Hold a model with random weights to JSON schemas that are drawn at random, and measure what the masks cost.

    python bench/json_schemas.py                     # 500 schemas, then decoding with and without a grammar
    python bench/json_schemas.py --schemas 0 --preset minimind-v1 --rows 1 32

Every answer that the model itself ended must be JSON that matches its schema; the exit code is 1 if one does not. For the
speed, the same model writes --new_tokens tokens freely, and under a schema that lets it write strings for ever; both take
turns, --rounds times, and the table has the medians. The masks of the latter are the costly ones: inside a string most
tokens are allowed.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonschema
import torch

from common.cli import Parser
from common.errors import first_line, run_script
from inference.backends import choose_backend
from inference.constraints import Constraint, answer_grammar
from inference.generator import generate
from inference.options import SamplingParams
from model.chat_style import chat_style
from model.LMConfig import PRESETS, preset
from model.model import Transformer
from model.tokenizer import load_tokenizer

PROMPT = [1, *range(100, 115)]
STRINGS = {"type": "array", "items": {"type": "string"}, "minItems": 100_000}


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """Return a JSON schema whose instances are short, with up to `depth` levels of arrays, objects and alternatives."""
    nested = ["array", "object", "anyOf"]
    match rng.choice(
        nested if depth > 1 else ["enum", "string", "integer", "number", "boolean", "null", *nested * depth]
    ):
        case "enum":
            return {"enum": rng.sample(["a", "</s>", "<tool_call>", '"\\\n', "你好", 1, -2.5, None, True], 3)}
        case "string":
            patterns: list[dict] = [{}, {"pattern": "^[a-z]{1,3}$"}, {"pattern": r"^\d{4}-\d\d$"}, {"format": "date"}]
            return {"type": "string", "maxLength": rng.randint(10, 12)} | rng.choice(patterns)
        case "integer":
            return {"type": "integer", "minimum": rng.randint(-50, 0), "maximum": rng.randint(1, 5000)}
        case "number":
            return {"type": "number", "exclusiveMinimum": -1, "maximum": 3}
        case "array":
            low = rng.randint(0, 2)
            items = random_schema(rng, depth - 1)
            return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randint(0, 2)}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
        case "object":
            names = rng.sample(["x", "名", "a b", "<s>", '"'], 3)
            properties = {name: random_schema(rng, depth - 1) for name in names}
            required = [name for name in names if rng.random() < 0.7]
            return {"type": "object", "properties": properties, "required": required}
        case simple:
            return {"type": simple}


def check_answers(model: Transformer, n_schemas: int, rows: int = 8) -> tuple[int, int, list[str]]:
    """Return how many answers the model ended, how many were cut off, and what is wrong with those that do not match."""
    tokenizer = load_tokenizer()
    tags = chat_style(tokenizer).tags
    schemas = [random_schema(random.Random(seed)) for seed in range(n_schemas)]
    samplings = [
        SamplingParams(
            max_new_tokens=400, temperature=1.0, seed=i,
            constraint=Constraint(tokenizer, answer_grammar(tags, schema=schema)),
        )
        for i, schema in enumerate(schemas)
    ]  # fmt: skip
    texts, finished, cut = [""] * n_schemas, 0, 0
    wrong = []
    for output in generate(model, [PROMPT] * n_schemas, samplings, tokenizer=tokenizer, max_rows=rows):
        texts[output.key] += output.text
        cut += output.finish == "length"
        if output.finish == "stop":
            finished += 1
            try:
                jsonschema.validate(json.loads(texts[output.key]), schemas[output.key])
            except (ValueError, jsonschema.ValidationError) as error:
                wrong.append(f"schema {output.key}: {texts[output.key]!r}: {first_line(error)}")
    return finished, cut, wrong


def tokens_per_second(
    model: Transformer, backend: Any, rows: int, sampling: SamplingParams, clock: Callable[[], float]
) -> float:
    start = clock()
    for _ in generate(model, [PROMPT] * rows, sampling, eos_id=None, backend=backend, max_rows=rows):
        pass
    return rows * sampling.max_new_tokens / (clock() - start)


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--schemas", type=int, default=500, help="how many are drawn")
    parser.add_argument("--preset", choices=PRESETS, default="minimind-v1-small", help="of the model that is timed")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="sequences decoded together")
    parser.add_argument("--new_tokens", type=int, default=200, help="per sequence")
    parser.add_argument("--rounds", type=int, default=5, help="of measurements")
    parser.add_argument("--cpu_time", action="store_true", help="measure CPU time, for machines shared with others")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.manual_seed(0)
    wrong: list[str] = []
    if args.schemas:
        small = Transformer(preset("toy", max_seq_len=1024, initializer_range=0.3)).eval()
        finished, cut, wrong = check_answers(small, args.schemas)
        print(f"{args.schemas} schemas: {finished} answers ended, {cut} were cut off, {len(wrong)} do not match")
        print("".join(f"{line}\n" for line in wrong), end="")
    model = Transformer(preset(args.preset)).eval().to(torch.bfloat16)
    backend = choose_backend(model)
    tokenizer = load_tokenizer()
    held = Constraint(tokenizer, answer_grammar(chat_style(tokenizer).tags, schema=STRINGS))
    print(f"\n{args.preset}, bfloat16, tokens/s of all sequences together\n")
    print("| sequences | sampling | free | held to a schema | ratio |\n|---|---|---|---|---|")
    for rows in args.rows:
        for name, how in (
            ("greedy", {}),
            ("temperature 0.7, top_p 0.9", {"temperature": 0.7, "top_p": 0.9, "seed": 0}),
        ):
            samplings = [SamplingParams(args.new_tokens, constraint=one, **how) for one in (None, held)]
            found = [
                [tokens_per_second(model, backend, rows, sampling, clock) for sampling in samplings]
                for _ in range(args.rounds + 1)
            ][1:]  # the first round warms up
            free, constrained = (statistics.median(one[i] for one in found) for i in (0, 1))
            ratio = statistics.median(b / a for a, b in found)
            print(f"| {rows} | {name} | {free:,.0f} | {constrained:,.0f} | {ratio:.2f} |", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    run_script(main)
