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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.stages import running_server  # noqa: E402
from common.cli import Parser  # noqa: E402
from common.errors import run_script  # noqa: E402

SCRIPTS = ROOT / "tests" / "clients"
PINS = ROOT / "requirements-clients.txt"
FEATURES = ("chat", "chat, streamed", "completions", "responses", "responses, streamed", "tools offered")
FEATURES += ("structured output", "required tool", "image", "embeddings")
FOLDER = ROOT / ".venv-clients"
VENV = ["-m", "venv", "--clear"]
TIMEOUT, INSTALL_TIMEOUT = 300, 600  # seconds for a client, and for a step of its installation
CLIENTS = {  # where it is installed, its script, its packages; llama-index excludes openai 3, and the others need it
    "openai": ("openai3", "use_openai.py", ["openai"]),
    "litellm": ("openai3", "use_litellm.py", ["litellm"]),
    "langchain-openai": ("openai3", "use_langchain.py", ["langchain-openai"]),
    "llama-index": ("openai2", "use_llama_index.py", ["llama-index-llms-openai-like", "llama-index-embeddings-openai-like"]),
    "pydantic-ai": ("openai3", "use_pydantic_ai.py", ["pydantic-ai-slim"]),
    "instructor": ("openai2", "use_instructor.py", ["instructor"]),
    "llm": ("openai3", "use_llm.py", ["llm"]),
    "npm-openai": ("npm", "use_openai.mjs", ["openai"]),
    "npm-ai": ("npm", "use_ai.mjs", ["ai", "@ai-sdk/openai"]),
}  # fmt: skip


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
    """The folder in which the clients are installed, in as few environments as their requirements allow.

    What is there already is used again, until its versions change.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def install(self, environment: str) -> str:
        """Install the clients of an environment; return why that failed, or ""."""
        if self.is_ready(environment):
            return ""
        folder, pins = self.folder / environment, pins_of(environment)
        print(f"installing {' '.join(pins)}", file=sys.stderr, flush=True)
        if environment == "npm":
            npm = ["npm", "install", "--no-audit", "--no-fund", "--no-save", "--fetch-retries", "1"]
            commands = [[*npm, "--prefix", str(folder), *pins]]
        else:
            pip = [str(self.python(environment)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            pip.append("--no-compile")  # little of it is imported
            commands = [[sys.executable, *VENV, str(folder)], [*pip, *pins]]
        folder.mkdir(parents=True, exist_ok=True)
        for command in commands:
            code, text = run_command(command, timeout=INSTALL_TIMEOUT)
            if code:
                lines = text.strip().splitlines() or ["it cannot be installed"]
                return next((line for line in lines if line.startswith(("ERROR:", "npm error"))), lines[-1])
        (folder / "installed.txt").write_text("\n".join([sys.version, *pins]), encoding="utf-8")
        return ""

    def is_ready(self, environment: str) -> bool:
        """Return whether an environment has everything, in the wanted versions and for this Python."""
        stamp = self.folder / environment / "installed.txt"
        return stamp.exists() and stamp.read_text(encoding="utf-8") == "\n".join([sys.version, *pins_of(environment)])

    def python(self, environment: str) -> Path:
        return self.folder / environment / ("Scripts" if os.name == "nt" else "bin") / "python"

    def command(self, client: str) -> list[str]:
        """Return what runs the script of a client."""
        environment, script, _ = CLIENTS[client]
        if environment != "npm":
            return [str(self.python(environment)), str(SCRIPTS / script)]
        folder = self.folder / environment
        for name in (script, "features.mjs"):
            shutil.copy(SCRIPTS / name, folder)  # Node looks for packages beside a script
        return ["node", str(folder / script)]


def pip_pins() -> dict[str, str]:
    """Return the lines of requirements-clients.txt by the names of their packages."""
    lines = (line.partition("#")[0].strip() for line in PINS.read_text(encoding="utf-8").splitlines())
    return {re.split(r"[\[=]", line)[0]: line for line in lines if line}


def npm_pins() -> dict[str, str]:
    return json.loads((SCRIPTS / "package.json").read_text(encoding="utf-8"))["dependencies"]


def pins_of(environment: str) -> list[str]:
    """Return the packages of an environment, with their versions."""
    if environment == "npm":
        return [f"{name}@{version}" for name, version in npm_pins().items()]
    return [pip_pins()[name] for where, _, names in CLIENTS.values() if where == environment for name in names]


def version_of(client: str) -> str:
    environment, _, names = CLIENTS[client]
    return npm_pins()[names[0]] if environment == "npm" else pip_pins()[names[0]].partition("==")[2]


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
    flags = ["--weights", folder / "full_sft_64.pth", "--device", "cpu", "--dtype", "float32", "--log_level", "error"]
    with running_server(*flags) as (address, name, _):
        yield f"{address}/v1", name


def run_client(command: list[str], base_url: str, model: str, row: Row, cwd: Path | None = None) -> Row:
    """Run the script of a client, and enter what it prints into its row."""
    # Nothing may go elsewhere, whatever the user's environment says.
    wanted = {"OPENAI_BASE_URL": base_url, "OPENAI_API_BASE": base_url, "OPENAI_API_KEY": "none", "MODEL": model}
    # What was not compiled when it was installed is compiled once.
    wanted |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONDONTWRITEBYTECODE": ""}
    mine = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    code, text = run_command(command, env={**mine, **wanted}, cwd=cwd, timeout=TIMEOUT)
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
    parser.add_argument("--only", nargs="+", choices=CLIENTS, default=[*CLIENTS], metavar="CLIENT", help="only these")
    parser.add_argument("--env", type=Path, default=FOLDER, help="folder to install them into")
    parser.add_argument("--install_only", action="store_true", help="install them and end: what run_tests.sh does")
    args = parser.parse_args()

    environments = Environments(args.env)
    reasons = {name: environments.install(name) for name in dict.fromkeys(CLIENTS[client][0] for client in args.only)}
    rows = [Row(client, version_of(client), skipped=reasons[CLIENTS[client][0]]) for client in args.only]
    if args.install_only:
        for row in filter(lambda row: row.skipped, rows):
            print(f"== {row.client} is not installed, and is left out of the tests: {row.skipped}")
        return 0
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (base_url, model):
        for row in rows:
            if not row.skipped:
                run_client(environments.command(row.client), base_url, model, row)
    print(table(rows))
    return int(any("FAILED" in row.outcomes.values() for row in rows))


if __name__ == "__main__":
    run_script(main)
