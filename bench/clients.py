"""Drive my_openai_api.py with the client libraries that people use, and print which of their features work.

    python bench/clients.py                        # the first time it installs them, into .venv-clients
    python bench/clients.py --only openai llm      # some of them

The clients are the scripts in tests/clients; requirements-clients.txt and tests/clients/package.json have their versions.
A client that cannot be installed is skipped, and the table says so. The server runs a tiny model with random weights.

yes       it works; what is streamed is also compared with the whole answer
–         the client does not have this, or its script does not try it
FAILED    anything else; the exit code is 1 then
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.cli import Parser  # noqa: E402
from common.errors import UserError, run_script  # noqa: E402

SCRIPTS = ROOT / "tests" / "clients"
PINS = ROOT / "requirements-clients.txt"
FEATURES = ("chat", "chat, streamed", "completions", "responses", "responses, streamed", "tools offered")
FEATURES += ("structured output", "required tool", "image", "embeddings")
VENV = ["-m", "venv"]
TIMEOUT = 300  # seconds for a client
PYTHON = {  # script, and what pip installs for it
    "openai": ("use_openai.py", ["openai"]),
    "litellm": ("use_litellm.py", ["litellm"]),
    "langchain-openai": ("use_langchain.py", ["langchain-openai"]),
    "llama-index": ("use_llama_index.py", ["llama-index-llms-openai-like", "llama-index-embeddings-openai-like"]),
    "pydantic-ai": ("use_pydantic_ai.py", ["pydantic-ai-slim"]),
    "instructor": ("use_instructor.py", ["instructor"]),
    "llm": ("use_llm.py", ["llm"]),
}
NPM = {"npm-openai": ("use_openai.mjs", ["openai"]), "npm-ai": ("use_ai.mjs", ["ai", "@ai-sdk/openai"])}


@dataclass
class Row:
    """A client in the table; skipped: why it could not be run."""

    client: str
    version: str = ""
    outcomes: dict[str, str] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    skipped: str = ""


def run_command(command: list[str], **settings) -> tuple[int, str]:
    """Return the exit code and everything that a command printed."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
            stdin=subprocess.DEVNULL, **settings,
        )  # fmt: skip
    except FileNotFoundError:
        return 127, f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return 124, f"no end within {settings['timeout']} seconds"
    return done.returncode, done.stdout


# ---- installing


class Environments:
    """The folder in which the clients are installed, each Python one in an environment of its own.

    What is there already is used again, until its versions change.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def install(self, client: str) -> str:
        """Install a client; return why that failed, or ""."""
        folder, script = self.folder / client, {**PYTHON, **NPM}[client][0]
        folder.mkdir(parents=True, exist_ok=True)
        if client in NPM:
            for path in (SCRIPTS / "package.json", SCRIPTS / "features.mjs", SCRIPTS / script):
                shutil.copy(path, folder)  # Node looks for packages beside a script
            pins = [f"{name}@{version}" for name, version in npm_pins().items() if name in NPM[client][1]]
            commands = [["npm", "install", "--no-audit", "--no-fund", "--no-save", "--prefix", str(folder), *pins]]
        else:
            pins = [pip_pins()[name] for name in PYTHON[client][1]]
            pip = [str(self.python(client)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            commands = [[sys.executable, *VENV, str(folder)], [*pip, *pins]]
        stamp = folder / "installed.txt"
        if not stamp.exists() or stamp.read_text(encoding="utf-8").split() != pins:
            print(f"installing {' '.join(pins)}", file=sys.stderr, flush=True)
            for command in commands:
                code, text = run_command(command)
                if code:
                    return (text.strip().splitlines() or ["it cannot be installed"])[-1]
            stamp.write_text("\n".join(pins), encoding="utf-8")
        return ""

    def python(self, client: str) -> Path:
        return self.folder / client / ("Scripts" if os.name == "nt" else "bin") / "python"

    def command(self, client: str) -> list[str]:
        """Return what runs the script of a client."""
        if client in NPM:
            return ["node", str(self.folder / client / NPM[client][0])]
        return [str(self.python(client)), str(SCRIPTS / PYTHON[client][0])]


def pip_pins() -> dict[str, str]:
    """Return the lines of requirements-clients.txt by the names of their packages."""
    lines = (line.partition("#")[0].strip() for line in PINS.read_text(encoding="utf-8").splitlines())
    return {re.split(r"[\[=]", line)[0]: line for line in lines if line}


def npm_pins() -> dict[str, str]:
    return json.loads((SCRIPTS / "package.json").read_text(encoding="utf-8"))["dependencies"]


def version_of(client: str) -> str:
    return npm_pins()[NPM[client][1][0]] if client in NPM else pip_pins()[PYTHON[client][1][0]].partition("==")[2]


# ---- running


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (base URL, name of the model) of a server with random weights; it never chooses the end token."""
    import torch

    from model.LMConfig import preset
    from model.tokenizer import EOS_ID, IMAGE_TOKEN, load_tokenizer
    from model.vision import VisionLanguageModel
    from model.weights_file import save_checkpoint

    torch.manual_seed(0)
    image_ids = [load_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN)] * 9
    vision = {"encoder": "vit", "width": 64, "image_ids": image_ids}
    model = VisionLanguageModel(preset("toy", max_seq_len=2048, initializer_range=0.2, vision_config=vision))
    with torch.no_grad():
        model.output.weight[EOS_ID] = 0
    save_checkpoint(folder / "full_sft_64.pth", model, info={"stage": "full_sft"})
    command = [sys.executable, str(ROOT / "my_openai_api.py"), "--weights", str(folder / "full_sft_64.pth")]
    command += ["--port", "0", "--device", "cpu", "--dtype", "float32", "--log_level", "error"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        try:
            found = next(
                (match for line in process.stdout if (match := re.match(r"serving (\S+) at (\S+)/v1", line))), None
            )
            if found is None:
                raise UserError("the server did not start: its messages are above")
            while True:
                with contextlib.suppress(OSError), urlopen(f"{found[2]}/health"):
                    break
                time.sleep(0.1)
            yield f"{found[2]}/v1", found[1]
        finally:
            process.terminate()


def run_client(command: list[str], base_url: str, model: str, row: Row, cwd: Path | None = None) -> Row:
    """Run the script of a client, and enter what it prints into its row."""
    # Nothing may go elsewhere, whatever the user's environment says.
    wanted = {"OPENAI_BASE_URL": base_url, "OPENAI_API_BASE": base_url, "OPENAI_API_KEY": "none", "MODEL": model}
    wanted |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    code, text = run_command(command, env={**os.environ, **wanted}, cwd=cwd, timeout=TIMEOUT)
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            result = json.loads(line)
            row.outcomes[result["feature"]] = result["outcome"]
            row.details[result["feature"]] = result["detail"]
    if code or not row.outcomes:
        row.outcomes["chat"] = row.outcomes.get("chat", "FAILED")
        row.details["the script"] = f"exit code {code}: {text[-2000:]}"
    return row


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table, with the words of the failures below it."""
    lines = [f"| client | {' | '.join(FEATURES)} |", f"|---|{'---|' * len(FEATURES)}"]
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.skipped:
            notes.setdefault(f"skipped: {row.skipped}", []).append(row.client)
        cells = ["skipped" if row.skipped else row.outcomes.get(feature, "–") for feature in FEATURES]
        lines.append(f"| {row.client} {row.version} | {' | '.join(cells)} |")
        for feature, detail in row.details.items():
            if detail:
                notes.setdefault(f"FAILED: {detail}", []).append(f"{row.client} ({feature})")
    return "\n".join([*lines, "", *(f"- {', '.join(where)}: {text}" for text, where in notes.items())])


def main() -> int:
    parser = Parser(description=__doc__)
    names = [*PYTHON, *NPM]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="CLIENT", help="only these (default: all)"
    )
    parser.add_argument("--env", type=Path, default=ROOT / ".venv-clients", help="folder to install them into")
    args = parser.parse_args()

    environments, rows = Environments(args.env), []
    for client in args.only:
        rows.append(Row(client, version_of(client), skipped=environments.install(client)))
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (base_url, model):
        for row in rows:
            if not row.skipped:
                run_client(environments.command(row.client), base_url, model, row)
    print(table(rows))
    return int(any("FAILED" in row.outcomes.values() for row in rows))


if __name__ == "__main__":
    run_script(main)
