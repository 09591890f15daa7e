"""Compare decoding speed: this toolkit in several ways, transformers' `generate` and llama.cpp.

    python bench/decode.py
    python bench/decode.py --presets minimind-v1-small --rows 1 16 --rounds 5
    python bench/decode.py --inductor             # also the step through torch.compile, which takes minutes to compile

Every scheme continues the same random prompts greedily with a model of random weights, --new_tokens tokens per row without
an end token, so that all do the same work. The schemes take turns, --rounds times, and the table has the median of the
tokens per second (of all rows together) and of the ratios within each round: machines are noisy, and ratios of
neighbouring measurements less so. llama.cpp needs `pip install -r requirements-bench.txt`. The mixture of experts is
compared with a dense model with the same number of active parameters.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.throughput import dense_equal
from common.cli import Parser  # noqa: E402
from common.errors import run_script
from export.gguf import write_gguf
from export.huggingface import write_llama
from inference.backends import TorchModel, choose_backend
from inference.generator import generate
from inference.kernels.decode_weights import DecodeWeights
from inference.options import SamplingParams
from model.LMConfig import PRESETS, LMConfig, preset
from model.model import Transformer, describe_parameters
from model.tokenizer import TOKENIZER_DIR, load_tokenizer

Scheme = Callable[[list[list[int]], int], float]  # prompts, new tokens of each -> seconds


def ours(model: Transformer, backend) -> Callable[[list[list[int]], int], None]:
    def run(prompts: list[list[int]], new_tokens: int) -> None:
        for _ in generate(model, prompts, SamplingParams(max_new_tokens=new_tokens), eos_id=None, backend=backend):
            pass

    return run


def transformers_generate(model: torch.nn.Module) -> Callable[[list[list[int]], int], None]:
    def run(prompts: list[list[int]], new_tokens: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip

    return run


def timed(run: Callable[[list[list[int]], int], None], cpu_time: bool) -> Scheme:
    clock = time.process_time if cpu_time else time.perf_counter

    def measure(prompts: list[list[int]], new_tokens: int) -> float:
        start = clock()
        run(prompts, new_tokens)
        return clock() - start

    return measure


class InOwnProcess:
    """Run llama.cpp in a process of its own, so that its threads do not disturb the others."""

    def __init__(self, *setup) -> None:
        self.pipe, other = get_context("spawn").Pipe()
        self.process = get_context("spawn").Process(target=serve_llama_cpp, args=(other, *setup), daemon=True)
        self.process.start()

    def __call__(self, prompts: list[list[int]], new_tokens: int) -> float:
        self.pipe.send((prompts, new_tokens))
        return self.pipe.recv()


def serve_llama_cpp(pipe: Connection, path: Path, rows: int, context: int, threads: int, cpu_time: bool) -> None:
    scheme = timed(llama_cpp(path, rows, context, threads), cpu_time)
    while True:
        try:
            pipe.send(scheme(*pipe.recv()))
        except EOFError:  # the other side has ended
            return


def llama_cpp(path: Path, rows: int, context: int, threads: int) -> Callable[[list[list[int]], int], None]:
    """Decode with llama.cpp's batch interface: one token of every row per call, as a server would."""
    import llama_cpp as lib
    import numpy as np

    silent = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silent, None)
    lib.llama_backend_init()
    parameters = lib.llama_model_default_params()
    parameters.use_extra_bufts = False  # with its kernels for AMX, version 0.3.36 crashes on q8_0
    model = lib.llama_model_load_from_file(str(path).encode(), parameters)
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = context * rows, 2048, 512, rows
    settings.n_threads = settings.n_threads_batch = threads
    state = lib.llama_init_from_model(model, settings)
    vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def feed(entries: list[tuple[int, int, int, bool]]) -> None:
        batch = lib.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (token, position, row, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = row, wanted
        if lib.llama_decode(state, batch) != 0:
            raise RuntimeError("llama.cpp refused a batch")
        lib.llama_batch_free(batch)

    def best(place: int) -> int:
        return int(np.ctypeslib.as_array(lib.llama_get_logits_ith(state, place), (vocab_size,)).argmax())

    def run(prompts: list[list[int]], new_tokens: int) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(state), True)
        tokens = []
        assert silent  # kept for as long as the library may call it
        for row, prompt in enumerate(prompts):
            feed([(token, i, row, i == len(prompt) - 1) for i, token in enumerate(prompt)])
            tokens.append(best(-1))
        position = len(prompts[0])
        for step in range(new_tokens - 1):
            feed([(token, position + step, row, True) for row, token in enumerate(tokens)])
            tokens = [best(row) for row in range(rows)]

    return run


def schemes(config: LMConfig, rows: int, folder: Path, args: argparse.Namespace) -> dict[str, Scheme]:
    torch.manual_seed(0)
    model = Transformer(config).eval()
    half = Transformer(config).eval()
    half.load_state_dict(model.state_dict())
    half = half.bfloat16()
    runs = {
        "eager, float32": ours(model, None),
        "eager, bfloat16": ours(half, None),
        "fast, float32": ours(model, choose_backend(model)),
        "fast, bfloat16": ours(half, choose_backend(half)),
        "fast, int8": ours(half, choose_backend(half, quantize="int8")),
    }
    if args.inductor:
        runs["torch.compile, bfloat16"] = ours(half, TorchModel(DecodeWeights(half), compiled=True))
        runs["torch.compile, int8"] = ours(half, TorchModel(DecodeWeights(half, "int8"), compiled=True))
    tokenizer = load_tokenizer()
    if "transformers" in args.others:
        from transformers import AutoModelForCausalLM

        write_llama(folder / "llama", model, TOKENIZER_DIR, torch.float32, {})
        for dtype in (torch.float32, torch.bfloat16):
            theirs = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=dtype).eval()
            theirs.generation_config.eos_token_id = None
            runs[f"transformers, {str(dtype).removeprefix('torch.')}"] = transformers_generate(theirs)
    made: dict[str, Scheme] = {name: timed(run, args.cpu_time) for name, run in runs.items()}
    if "llama.cpp" in args.others:
        for kind in ("f16", "q8_0"):
            path = folder / f"{kind}.gguf"
            write_gguf(path, model, tokenizer, kind, "bench")
            context = args.prompt_tokens + args.new_tokens + 1
            made[f"llama.cpp, {kind}"] = InOwnProcess(path, rows, context, args.threads, args.cpu_time)
    return made


def compare(title: str, config: LMConfig, rows: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Measure all schemes in turns and print their table; returns the tokens per second of each."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, config.vocab_size, (rows, args.prompt_tokens), generator=generator).tolist()
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "llama").mkdir()
        made = schemes(config, rows, Path(folder), args)
        for scheme in made.values():
            scheme(prompts, 8)  # warm up, compile
        for _ in range(args.rounds):
            for name, scheme in made.items():
                rates.setdefault(name, []).append(rows * args.new_tokens / scheme(prompts, args.new_tokens))
    first, last = next(iter(rates.values())), rates.get("llama.cpp, f16")
    print(
        f"\n{title}, {rows} at a time\n{'scheme':26} {'tokens/s':>9} {'to eager float32':>17} {'to llama.cpp f16':>17}"
    )
    for name, own in rates.items():
        ratios = [f"{ratio(own, base):.2f}" if base else "-" for base in (first, last)]
        print(f"{name:26} {statistics.median(own):9,.0f} {ratios[0]:>17} {ratios[1]:>17}", flush=True)
    return rates


def ratio(own: list[float], base: list[float]) -> float:
    """Return the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(own, base, strict=True))


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--presets", nargs="+", choices=[*PRESETS], default=["minimind-v1-small", "minimind-v1-moe"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="sequences at a time (default: 1 16)")
    parser.add_argument("--prompt_tokens", type=int, default=16, help="length of the prompts (default: 16)")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens of each answer (default: 128)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every scheme (default: 5)")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="number of threads for all schemes (default: PyTorch's)",
    )
    parser.add_argument(
        "--cpu_time", action="store_true",
        help="measure CPU time instead of wall time: for a busy machine, with --threads 1",
    )  # fmt: skip
    parser.add_argument("--inductor", action="store_true", help="also the step through torch.compile")
    parser.add_argument(
        "--others", nargs="*", choices=["transformers", "llama.cpp"], default=["transformers", "llama.cpp"],
        help="what to compare with (default: both)",
    )  # fmt: skip
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{args.threads} threads, prompts of {args.prompt_tokens} tokens, answers of {args.new_tokens}"
        + (", processor time" if args.cpu_time else "")
    )
    for name in args.presets:
        config = preset(name)
        with torch.device("meta"):
            print(f"\n{name}: {describe_parameters(Transformer(config))}")
        for rows in args.rows:
            rates = compare(name, config, rows, args)
            if config.use_moe:
                equal = dense_equal(config)
                only_ours = argparse.Namespace(**vars(args) | dict(others=[], inductor=False))
                dense = compare(f"dense, as many active (hidden_dim {equal.hidden_dim})", equal, rows, only_ours)
                for kind in ("bfloat16", "int8"):
                    cost = ratio(dense[f"fast, {kind}"], rates[f"fast, {kind}"])
                    print(
                        f"fast, {kind}, {rows} at a time: the mixture of experts takes {cost:.2f} times as long as the dense"
                    )


if __name__ == "__main__":
    run_script(main)
