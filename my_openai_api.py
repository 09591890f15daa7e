"""Serve a model over HTTP as OpenAI's API, to many clients at once.

    python my_openai_api.py                                     # the newest of out/rl_*, full_sft_*, lora_*
    python my_openai_api.py --weights out/lora_identity_512     # an adapter folder, or one that export_model.py made
    python my_openai_api.py --host 0.0.0.0 --api_key "$KEY"     # for other machines

In:  a checkpoint, an adapter folder, or an exported folder (--weights)
Out: http://127.0.0.1:8000/v1 (models, chat/completions, responses, completions, embeddings), /health, /metrics, /docs

Requests are decoded together: each step computes one token for every running answer, and requests join and leave between
steps. SIGTERM or Ctrl-C lets running answers finish, for at most --drain_seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from common.cli import flag, parse_options
from common.errors import UserError, first_line, run_script
from inference.model_finder import CHAT_STAGES, require_model
from inference.options import ModelOptions, SamplingParams, model_options, sampling_options
from inference.terminal import use_utf8

KEY_VARIABLE = "MINIMIND_API_KEY"


@dataclass
class Options:
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0: all (default: 127.0.0.1, this machine only)")
    port: int = flag(8000, "0: any free one", min=0, max=65535)
    api_key: str | None = flag(
        None, f"key that clients of /v1 must send; better in the environment as {KEY_VARIABLE} (default: none)",
        metavar="KEY",
    )  # fmt: skip
    cors_origins: list[str] = flag(
        [], "sites whose pages may call from a browser, like http://localhost:3000; *: all (default: none)", nargs="+",
        metavar="ORIGIN",
    )  # fmt: skip
    allowed_hosts: list[str] = flag(
        [], "names by which clients reach the server; *: any (default: localhost and --host; addresses always work)",
        nargs="+", metavar="NAME",
    )  # fmt: skip
    allow_image_urls: bool = flag(
        False, "fetch images that requests name by their address, from public addresses only (default: only data URLs)"
    )
    vision_encoder: Path | None = flag(
        None,
        "folder of the image encoder, for a vision-language model without its own (default: that of its training)",
        metavar="FOLDER",
    )
    strict: bool = flag(False, "reject requests with fields that would be ignored, like tools")
    served_model_name: str | None = flag(None, "the model's name in requests (default: the file's)", metavar="NAME")
    max_rows: int = flag(32, "answers that are decoded at the same time", min=1, metavar="N")
    max_queue: int = flag(
        256, "answers, and requests for embeddings or scores, that may wait; more are rejected", min=1, metavar="N"
    )
    prefill_tokens: int | None = flag(
        None, "tokens of prompts and texts that are read between two steps of running answers (default: "
        "8 on a CPU, otherwise 256)", min=1, metavar="TOKENS",
    )  # fmt: skip
    prefix_cache_mb: int = flag(256, "memory for prefixes that prompts share; 0: none", min=0, metavar="MB")
    timeout_keep_alive: int = flag(
        15, "time in which a connection must send the head of a request", min=1, metavar="SECONDS"
    )
    drain_seconds: float = flag(30, "time for running answers to finish at the end", min=0, max=1e6, metavar="SECONDS")
    log_level: str = flag("info", "how much the server logs", choices=["error", "warning", "info", "debug"])
    model: ModelOptions = model_options()
    # For what a request does not set. Without --max_new_tokens, a request that sets no limit gets as much as fits.
    sampling: SamplingParams = sampling_options(temperature=0.7, top_p=0.9, max_new_tokens=None)

    def validate(self) -> list[str]:
        if self.api_key is None:
            self.api_key = os.environ.get(KEY_VARIABLE) or None
        elif not self.api_key.strip():
            return ["--api_key is empty: leave it out if you need none"]
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            return ["the API key has characters that clients cannot send: use ASCII letters, digits and signs"]
        return []


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket: an address that is taken is an error before the model is loaded.

    It listens at once, or a second server could bind it too; clients that connect while the model loads are answered later.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    if os.name == "posix":  # elsewhere it would allow two servers on one port
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port or --host"
        ) from None
    return sock


def main() -> None:
    use_utf8()
    options = parse_options(Options, __doc__)
    sock = bind(options.host, options.port)

    logging.basicConfig(format="%(levelname)s:     %(message)s")  # as uvicorn's lines
    logging.getLogger("minimind").setLevel(options.log_level.upper())
    # torch and the server's libraries take seconds to load: --help and wrong flags do not wait for them
    from inference.generator import BatchGenerator
    from inference.model_loader import load_text_generator
    from inference.vision import require_vision
    from serving.app import create_app
    from serving.endpoint import ServedModel
    from serving.engine import Engine
    from serving.images import ImageReader
    from serving.server import Server

    path = options.model.weights or require_model(options.model.out_dir, CHAT_STAGES, "3-full_sft.py")
    generator = load_text_generator(path, options.model, vision_encoder=options.vision_encoder)
    checkpoint, context, tokenizer = generator.checkpoint, generator.context, generator.tokenizer
    config, rows = checkpoint.config, options.max_rows
    make_generator = functools.partial(
        BatchGenerator, checkpoint.model, rows, context, tokenizer=tokenizer, backend=generator.backend
    )
    try:
        engine = Engine(
            make_generator,
            options.max_queue,
            prefill_tokens=options.prefill_tokens,
            prefix_bytes=options.prefix_cache_mb * 10**6,
        )
    except (OSError, RuntimeError) as error:  # from the system or PyTorch, if the memory is not enough
        size = 2 * config.n_layers * config.n_kv_heads * config.head_dim * checkpoint.model.dtype.itemsize
        raise UserError(
            f"not enough memory for {rows} answers of {context} tokens ({size * rows * context / 1e9:,.1f} GB; "
            f"{first_line(error)}): give a smaller --max_rows or --max_seq_len"
        ) from error
    path = checkpoint.path.resolve()
    name = options.served_model_name or (path.name if path.is_dir() else path.stem)
    if options.allow_image_urls:
        require_vision(checkpoint.model, checkpoint.path)
    prepare = generator.image_processor
    reader = None if prepare is None else ImageReader(prepare, options.allow_image_urls)
    served = ServedModel(name, tokenizer, config.dim, config.vocab_size, checkpoint.fingerprint, images=reader)
    limit = options.sampling.max_new_tokens
    defaults = dataclasses.replace(options.sampling, max_new_tokens=context if limit is None else limit)
    app = create_app(
        engine, served, defaults,
        api_key=options.api_key, cors_origins=options.cors_origins,
        allowed_hosts=options.allowed_hosts or ["localhost", options.host], strict=options.strict,
    )  # fmt: skip

    host, port = sock.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(f"serving {name} at http://{address}/v1 ({rows} answers at a time, {options.max_queue} may wait)", flush=True)
    if options.api_key is None and not (host == "::1" or host.startswith("127.")):
        print("note: other machines can reach this server, and it has no --api_key: anyone may use it", flush=True)
    server = Server(
        app, engine, options.drain_seconds, timeout_keep_alive=options.timeout_keep_alive, log_level=options.log_level
    )
    try:
        server.run(sockets=[sock])
    except KeyboardInterrupt:  # uvicorn raises it again after its shutdown
        print("ended")
    if engine.failed:
        raise UserError("the engine failed, and the server has ended: the reason is above")


if __name__ == "__main__":
    run_script(main)
