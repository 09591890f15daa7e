"""The command llm, with the model declared in its file of OpenAI-like models, as its documentation says."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from features import BASE_URL, LENGTH, MODEL, PARAMETERS, QUESTION, run

SCHEMA = json.dumps(PARAMETERS)
folder = tempfile.TemporaryDirectory()  # deleted at the end
home = Path(folder.name)
entry = f"model_name: {MODEL}\n  api_base: {BASE_URL}\n  supports_schema: true\n  supports_tools: true\n"
(home / "extra-openai-models.yaml").write_text(
    f"- model_id: mini\n  {entry}- model_id: mini-text\n  {entry}  completion: true\n"
)


def llm(*args: str, model: str = "mini") -> str:
    command = [
        sys.executable,
        "-m",
        "llm",
        "-m",
        model,
        *args,
        "-o",
        "temperature",
        "0",
        "-o",
        "max_tokens",
        str(LENGTH),
    ]
    done = subprocess.run(command, env={**os.environ, "LLM_USER_PATH": str(home)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


run(
    {
        "chat": lambda: llm(QUESTION, "--no-stream"),
        "chat, streamed": lambda: llm(QUESTION),
        "completions": lambda: llm("Once", model="mini-text"),
        "tools offered": lambda: llm(QUESTION, "-T", "llm_time", "--no-stream"),
        "structured output": lambda: llm(QUESTION, "--schema", SCHEMA, "--no-stream"),
    }
)
