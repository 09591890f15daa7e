"""Serve a model over HTTP as OpenAI's API, to many clients at once.

    python my_openai_api.py                                     # the newest of out/rl_*, full_sft_*, lora_*
    python my_openai_api.py --weights out/lora_identity_512     # an adapter folder, or one that export_model.py made
    python my_openai_api.py --host 0.0.0.0 --api_key "$KEY"     # for other machines

In:  a checkpoint, an adapter folder, or an exported folder (--weights)
Out: http://127.0.0.1:8000/v1: models, chat/completions, completions, embeddings; and /health, /metrics, /docs

Requests are decoded together: each step makes one token for every running answer, and requests join and leave between
steps. SIGTERM or Ctrl-C lets running answers finish, for at most --drain_seconds.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load: no traceback

import argparse
import functools
import os
import socket

import uvicorn

from common.cli import Parser
from common.errors import UserError, run_script
from inference.generator import BatchGenerator
from inference.model_finder import CHAT_STAGES, require_model
from inference.model_loader import load_text_generator
from inference.options import add_model_flags, add_sampling_flags, sampling_from_args
from inference.terminal import use_utf8
from serving.app import create_app
from serving.endpoint import ServedModel
from serving.engine import Engine
from serving.http import STALL_SECONDS, Server

KEY_VARIABLE = "MINIMIND_API_KEY"


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    server = parser.add_argument_group("the server")
    server.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: 127.0.0.1, this machine only)"
    )
    server.add_argument("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    server.add_argument(
        "--api_key", metavar="KEY",
        help=f"what clients of /v1 have to send; better in the environment as {KEY_VARIABLE} (default: nothing)",
    )  # fmt: skip
    server.add_argument(
        "--cors_origins", nargs="+", default=[], metavar="ORIGIN",
        help="sites whose pages may call from a browser, like http://localhost:3000; *: all (default: none)",
    )  # fmt: skip
    server.add_argument(
        "--served_model_name", metavar="NAME", help="the model's name in requests (default: the file's)"
    )
    server.add_argument(
        "--max_rows", type=int, default=32, metavar="N", help="answers that are written at a time (default: 32)"
    )
    server.add_argument(
        "--max_queue", type=int, default=256, metavar="N", help="answers that may wait; more are refused (default: 256)"
    )
    server.add_argument(
        "--drain_seconds", type=float, default=30, metavar="SECONDS", help="time to finish at the end (default: 30)"
    )
    server.add_argument(
        "--log_level", default="info", choices=["error", "warning", "info", "debug"], help="(default: info)"
    )
    add_model_flags(parser, stages="of rl_*.pth, full_sft_*.pth and lora_* in OUT_DIR; folders will do as well")
    # What a request does not say. A limit that it does not give is what fits, unless --max_new_tokens says less.
    add_sampling_flags(parser, temperature=0.7, top_p=0.9, max_new_tokens=None)
    args = parser.parse_args()
    errors = [
        f"--{name} {getattr(args, name)} must be at least 1"
        for name in ("max_rows", "max_queue")
        if getattr(args, name) < 1
    ]
    if not 0 <= args.port <= 65535:
        errors.append(f"--port {args.port} must be between 0 and 65535")
    if not 0 <= args.drain_seconds < 1e6:
        errors.append(f"--drain_seconds {args.drain_seconds} must be 0 or more")
    if args.api_key is None:
        args.api_key = os.environ.get(KEY_VARIABLE) or None
    elif not args.api_key.strip():
        errors.append("--api_key is empty: leave it out if none is needed")
    if args.api_key and not (args.api_key.isascii() and args.api_key.isprintable()):
        errors.append("the key has characters that clients cannot send: use ASCII letters, digits and signs")
    if errors:
        parser.error(errors)
    return args


def bind(host: str, port: int) -> socket.socket:
    """A socket with that address: one that is taken is found out before the model is loaded.

    It listens at once, or a second server could bind it too; whoever calls while the model loads is answered afterwards.
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
    args = parse_args()
    sock = bind(args.host, args.port)
    path = args.weights or require_model(args.out_dir, CHAT_STAGES, "3-full_sft.py")
    generator = load_text_generator(path, args)
    checkpoint, context = generator.checkpoint, generator.context
    if args.max_new_tokens is None:
        args.max_new_tokens = context
    defaults = sampling_from_args(args)
    make_decoder = functools.partial(
        BatchGenerator,
        checkpoint.model,
        args.max_rows,
        context,
        tokenizer=generator.tokenizer,
        backend=generator.backend,
    )
    config = checkpoint.config
    try:
        engine = Engine(make_decoder, args.max_queue)
    except (OSError, RuntimeError) as error:  # what the system and PyTorch say if memory is not enough
        size = 2 * config.n_layers * config.n_kv_heads * config.head_dim * checkpoint.model.dtype.itemsize
        raise UserError(
            f"no memory for {args.max_rows} answers of {context} tokens ({size * args.max_rows * context / 1e9:,.1f} GB; "
            f"{str(error).splitlines()[0]}): give a smaller --max_rows or --max_seq_len"
        ) from error
    path = checkpoint.path.resolve()
    name = args.served_model_name or (path.name if path.is_dir() else path.stem)
    served = ServedModel(name, generator.tokenizer, config.dim, config.vocab_size, checkpoint.fingerprint)
    app = create_app(engine, served, defaults, api_key=args.api_key, cors_origins=args.cors_origins)

    host, port = sock.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(
        f"serving {name} at http://{address}/v1 ({args.max_rows} answers at a time, {args.max_queue} may wait)",
        flush=True,
    )
    if args.api_key is None and not (host == "::1" or host.startswith("127.")):
        print("note: other machines can reach this server, and no --api_key is set: everyone may use it", flush=True)
    # Answers end by themselves when the engine does; this is for clients that do not even read that.
    grace = int(args.drain_seconds + STALL_SECONDS) + 5
    settings = uvicorn.Config(app, log_level=args.log_level, timeout_graceful_shutdown=grace)
    try:
        Server(settings, engine, args.drain_seconds).run(sockets=[sock])
    except KeyboardInterrupt:  # uvicorn raises it again when it is done
        print("ended")


if __name__ == "__main__":
    run_script(main)
