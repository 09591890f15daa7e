"""Chat on the terminal with a server of OpenAI's API, such as my_openai_api.py.

    python chat_openai_api.py                                   # the server on this machine
    python chat_openai_api.py --base_url http://10.0.0.5:8000/v1 --api_key KEY --system "Answer in one sentence."
    python chat_openai_api.py --tools                           # the model may call tools, which run here

In:  the address of a server (--base_url)
Out: the conversation on the terminal; /save FILE keeps it in the format that 3-full_sft.py trains on

The server remembers nothing: each question is sent together with what was said before, as much as --history_turns says and
the server's context holds.
"""

from __future__ import annotations

import os
import urllib.parse
from dataclasses import dataclass
from typing import Any

from common.cli import flag, flag_group, parse_options, range_errors
from common.errors import run_script
from inference.options import ChatOptions, SamplingParams, sampling_flags
from inference.terminal import use_utf8

KEY_VARIABLE = "MINIMIND_API_KEY"


@dataclass
class Options(ChatOptions):
    base_url: str = flag("http://127.0.0.1:8000/v1", "address of the server", metavar="URL")
    model: str | None = flag(None, "name of the model (default: the first one the server has)", metavar="NAME")
    api_key: str | None = flag(None, f"better in the environment as {KEY_VARIABLE} (default: none)", metavar="KEY")
    timeout: float = flag(60.0, "how long to wait for the next piece", above=0, metavar="SECONDS")
    stop: list[str] = flag([], "end before this text appears; repeatable", action="append", metavar="TEXT")
    sampling: dict[str, Any] = flag_group(
        "how tokens are chosen", "The server decides what is not given here.", sampling_flags
    )

    def validate(self) -> list[str]:
        errors = range_errors(SamplingParams, self.sampling)
        if "" in self.stop:
            errors.append("--stop must not be empty")
        try:
            address = urllib.parse.urlsplit(self.base_url)
            if address.scheme not in ("http", "https"):
                raise ValueError("it must begin with http:// or https://")
            if not address.hostname or address.port == 0:
                raise ValueError("no host and port")
            address.hostname.encode("idna")
        except ValueError as error:  # UnicodeError is one, too
            errors.append(f"--base_url {self.base_url} is not an address ({error}): like http://127.0.0.1:8000/v1")
        self.api_key = self.api_key or os.environ.get(KEY_VARIABLE) or "none"  # the library insists on one
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            errors.append("the key has characters that cannot be sent: keys are ASCII letters, digits and signs")
        return errors


def main() -> None:
    use_utf8()
    options = parse_options(Options, __doc__)
    import openai  # takes a second

    from evaluation.tools import chat_tools
    from inference.remote_chat import RemoteChat

    tools = chat_tools(options.tools)
    sampling = options.sampling | ({"stop": options.stop} if options.stop else {})
    with openai.OpenAI(base_url=options.base_url, api_key=options.api_key, timeout=options.timeout) as client:
        chat = RemoteChat(client, options.model, sampling, options.system, options.history_turns, **tools)
        print(f"{chat.model} at {chat.base_url}" + (f", {chat.context} tokens of context" if chat.context else ""))
        chat.run()


if __name__ == "__main__":
    run_script(main)
