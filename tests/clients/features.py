"""Run the features of a client against a server, and print a line of JSON for each; bench/clients.py makes a table of them.

OPENAI_BASE_URL, OPENAI_API_KEY and MODEL are in the environment.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence

MODEL = os.environ["MODEL"]
BASE_URL = os.environ["OPENAI_BASE_URL"]
QUESTION = "Who are you?"
MESSAGES = [{"role": "user", "content": QUESTION}]
IMAGE_URL = (  # one blue pixel
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYPgPAAEDAQAIicLsAAAAAElFTkSuQmCC"
)
LENGTH = 48  # of answers, in tokens
NAMES = ("Ann", "Bob")  # few and short: a model with random weights has to come to an end
PARAMETERS = {"type": "object", "properties": {"word": {"enum": NAMES}}, "required": ["word"]}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": PARAMETERS}}]


def named(*functions: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """Return features by the names of their functions: `chat_streamed` is "chat, streamed"."""
    return {f.__name__.replace("_streamed", ", streamed").replace("_", " "): f for f in functions}


def run(features: dict[str, Callable[[], object]]) -> None:
    """Call every feature. It works if it returns something; "X, streamed" must return the same as "X"."""
    results: dict[str, object] = {}
    for name, feature in features.items():
        try:
            results[name] = feature()
            assert results[name], "nothing came back"
            same = results.get(name.removesuffix(", streamed"))
            assert results[name] == same, f"{results[name]!r} instead of {same!r}"
            outcome, detail = "yes", ""
        except Exception as error:
            outcome, detail = "FAILED", f"{type(error).__name__}: {error}"
        print("\n" + json.dumps({"feature": name, "outcome": outcome, "detail": detail[:1000]}), flush=True)


def is_embedding(*vectors: Sequence[float]) -> bool:
    """Return whether these are vectors of length 1."""
    return all(len(vector) > 1 and math.isclose(math.hypot(*vector), 1, abs_tol=1e-4) for vector in vectors)
