"""Chat on the terminal with a server that speaks OpenAI's API, such as my_openai_api.py.

    python chat_openai_api.py                                   # the server on this machine
    python chat_openai_api.py --base_url http://10.0.0.5:8000/v1 --api_key KEY --system "Answer in one sentence."

In:  the address of a server (--base_url)
Out: the conversation on the terminal; /save FILE keeps it in the format that 3-full_sft.py trains on

The server remembers nothing: each question is sent together with what was said before, as much as --history_turns says and
the server's context holds.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load: no traceback

import argparse
import itertools
import os
import time
import urllib.parse

import openai

from common.cli import Parser
from common.errors import UserError, run_script
from inference.options import SamplingParams, add_sampling_flags
from inference.terminal import interact, use_utf8, visible
from model.chat_format import split_turns

KEY_VARIABLE = "MINIMIND_API_KEY"
STANDARD = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")
EXTENSIONS = ("top_k", "min_p", "repetition_penalty")  # not OpenAI's: sent only if they are asked for, as all others


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--base_url", default="http://127.0.0.1:8000/v1", metavar="URL", help="(default: http://127.0.0.1:8000/v1)"
    )
    parser.add_argument("--model", metavar="NAME", help="(default: the first that the server has)")
    parser.add_argument("--system", metavar="TEXT", help="a system message, in front of everything")
    parser.add_argument("--api_key", metavar="KEY", help=f"better in the environment as {KEY_VARIABLE} (default: none)")
    parser.add_argument("--history_turns", type=int, default=5, metavar="N", help="earlier turns it sees (default: 5)")
    parser.add_argument(
        "--timeout", type=float, default=60, metavar="SECONDS", help="wait so long for the next piece (default: 60)"
    )
    # Nothing is sent for a flag that is not given: the server then decides.
    undecided = dict.fromkeys([*STANDARD, *EXTENSIONS, "max_new_tokens"])
    add_sampling_flags(parser, **undecided)
    args = parser.parse_args()
    errors = []
    if args.history_turns < 0:
        errors.append(f"--history_turns {args.history_turns} must not be negative")
    if not args.timeout > 0:
        errors.append(f"--timeout {args.timeout} must be above 0")
    if not args.base_url.startswith(("http://", "https://")):
        errors.append(f"--base_url {args.base_url} must begin with http:// or https://")
    given = {name: value for name in undecided if (value := getattr(args, name)) is not None}
    try:
        SamplingParams(**given, stop=tuple(args.stop))
    except ValueError as error:
        errors.append(str(error))
    if errors:
        parser.error(errors)
    return args


class Chat:
    """A conversation with a server."""

    def __init__(self, client: openai.OpenAI, args: argparse.Namespace) -> None:
        """Asks the server for its models. UserError if it is not there, or has no such model."""
        self.client, self.base_url = client, args.base_url
        try:
            models = {model.id: model for model in client.models.list()}
        except openai.APIError as error:
            raise UserError(self.explain(error)) from error
        if not models:
            raise UserError(f"{args.base_url} has no models")
        self.model = args.model or next(iter(models))
        if self.model not in models:
            raise UserError(f"--model {self.model}: {args.base_url} has {', '.join(models)}")
        self.context = getattr(models[self.model], "max_model_len", None)  # this server and a few others say it
        self.history_turns = args.history_turns
        self.system = [{"role": "system", "content": args.system}] if args.system else []
        self.turns: list[dict] = []
        self.how = {name: getattr(args, name) for name in STANDARD if getattr(args, name) is not None}
        self.how["extra_body"] = {name: getattr(args, name) for name in EXTENSIONS if getattr(args, name) is not None}
        if args.stop:
            self.how["stop"] = args.stop
        # Where the server says how much it holds, half is kept for the answer; it refuses what does not fit then, and
        # `answer` leaves turns out.
        limit = args.max_new_tokens or (self.context and self.context // 2)
        if limit:
            self.how["max_tokens"] = limit

    def answer(self, question: str) -> None:
        """Print the answer as it comes; both become part of the conversation.

        Raises ValueError, and nothing changes, if there is no answer.
        """
        turns = split_turns(self.turns)[1]
        history = turns[-self.history_turns :] if self.history_turns else []
        left_out = 0
        while True:
            messages = [*self.system, *itertools.chain(*history[left_out:]), {"role": "user", "content": question}]
            try:
                pieces = self.client.chat.completions.create(
                    model=self.model, messages=messages, stream=True, stream_options={"include_usage": True}, **self.how
                )
                break
            except openai.BadRequestError as error:
                if error.code != "context_length_exceeded" or left_out == len(history):
                    raise ValueError(self.explain(error)) from error
                left_out += 1
            except openai.APIError as error:
                raise ValueError(self.explain(error)) from error
            except UnicodeEncodeError as error:
                raise ValueError(f"the question is not Unicode at character {error.start}: write it again") from error
            except KeyboardInterrupt:
                raise ValueError("stopped") from None
        if left_out:
            print(f"[the context is full: {left_out} of {len(history)} earlier turns left out]")
        self._print(question, pieces)

    def _print(self, question: str, pieces: openai.Stream) -> None:
        started, text, finish, usage, end = time.perf_counter(), "", None, None, ""
        try:
            for piece in pieces:
                usage = piece.usage or usage
                for choice in piece.choices:
                    finish = choice.finish_reason or finish
                    new = choice.delta.content or ""
                    text += new
                    print(visible(new), end="", flush=True)
            if finish is None:
                end = " [cut off: the server ended the answer early]"
            elif finish != "stop":
                end = f" [cut off: {finish}]"
        except KeyboardInterrupt:
            end = " [stopped]"
        except openai.APIError as error:
            end = f" [cut off: {self.explain(error)}]"
        finally:
            pieces.close()  # the server stops writing then
        seconds = time.perf_counter() - started
        rate = f"[{usage.completion_tokens} tokens, {usage.completion_tokens / seconds:.1f} tokens/s]" if usage else ""
        print(f"{end}\n{rate}\n", flush=True)
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]

    def explain(self, error: openai.APIError) -> str:
        """What went wrong, and what to do."""
        if isinstance(error, openai.APITimeoutError):
            return f"{self.base_url} did not answer in time: it may be busy; --timeout gives it longer"
        if isinstance(error, openai.APIConnectionError):
            return f"no server at {self.base_url}: start one (python my_openai_api.py), or name another with --base_url"
        told = error.body.get("message") if isinstance(error.body, dict) else None
        message = str(told or error.message)
        if isinstance(error, openai.AuthenticationError):
            return f"{self.base_url} refuses the key ({message}): give it with --api_key or in {KEY_VARIABLE}"
        if isinstance(error, openai.NotFoundError):
            return f"{self.base_url} says: {message}; does the address end in /v1?"
        return f"{self.base_url} says: {message}"


def main() -> None:
    use_utf8()
    args = parse_args()
    key = args.api_key or os.environ.get(KEY_VARIABLE) or "none"  # the library insists on one
    if not (key.isascii() and key.isprintable()):
        raise UserError("the key has characters that cannot be sent: keys are ASCII letters, digits and signs")
    try:
        address = urllib.parse.urlsplit(args.base_url)
        if not address.hostname or address.port == 0:
            raise ValueError("no host and port")
        address.hostname.encode("idna")
    except ValueError as error:  # UnicodeError is one, too
        raise UserError(
            f"--base_url {args.base_url} is not an address ({error}): like http://127.0.0.1:8000/v1"
        ) from error
    with openai.OpenAI(base_url=args.base_url, api_key=key, timeout=args.timeout) as client:
        chat = Chat(client, args)
        print(f"{chat.model} at {args.base_url}" + (f", {chat.context} tokens of context" if chat.context else ""))
        interact(chat)


if __name__ == "__main__":
    run_script(main)
