"""lm-eval, the harness of public leaderboards, on an exported folder and on the running server: its scores are ours."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tolerances import log_probability_rounding

from common.files import atomic_folder
from evaluation.ceval import LETTERS, chat_prompt, plain_prompt, read_examples, read_questions
from evaluation.evaluated_model import EvaluatedModel
from evaluation.scoring import MultipleChoice, score
from export.huggingface import describe, write_llama
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import BOS_ID, TOKENIZER_DIR, encode_text, load_tokenizer
from model.weights_file import Checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]

TASK = """\
task: minimind_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1
"""
DOCS = [
    {"question": "中国的首都是", "choices": ["北京", "东京", "巴黎的塔", "London"], "answer": 0},
    {"question": "The sun rises in the", "choices": [" east", " west", " north of it", " sea"], "answer": 0},
    {"question": "水的化学式是", "choices": ["CO2", "H2O", "NaCl", "O2。"], "answer": 1},
    {"question": "2 + 2 =", "choices": [" 3", " 4", " 5", " 22"], "answer": 1},
    {"question": "一年有", "choices": ["十个月", "十二个月", "两天", "百年"], "answer": 1},
    {"question": "Who wrote this?", "choices": [" Me.", " You.", " Nobody knows.", " 他"], "answer": 2},
]


# The harness takes long to import: one process does all evaluations. Each is a command line.
HARNESS = """
import json, sys
from lm_eval.__main__ import cli_evaluate
for flags in json.load(sys.stdin):
    sys.argv = ["lm_eval", *flags]
    cli_evaluate()
"""


def prepare(folder: Path, *args: object, docs: list[dict] = DOCS) -> list[str]:
    """Return the command line that evaluates a local task of `docs` into `folder`/results."""
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs), encoding="utf-8")
    (folder / "task.yaml").write_text(TASK.format(data=data.as_posix()), encoding="utf-8")
    task = ["--tasks", "minimind_local", "--include_path", folder, "--output_path", folder / "results", "--log_samples"]
    return [str(arg) for arg in (*args, *task)]


def results(folder: Path) -> tuple[dict, list[dict]]:
    """Return the harness' scores, and its samples in the order of the documents."""
    (found,) = (folder / "results").rglob("results_*.json")
    (samples,) = (folder / "results").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    scores = json.loads(found.read_text(encoding="utf-8"))["results"]["minimind_local"]
    return scores, sorted(rows, key=lambda row: row["doc_id"])


def our_scores(model: Transformer, start: list[int], docs: list[dict] = DOCS) -> list[torch.Tensor]:
    """Scores of the same items after the tokens `start`.

    The harness encodes question and choice together, and cuts where the question ends.
    """
    tokenizer = load_tokenizer()
    items = []
    for doc in docs:
        question = encode_text(tokenizer, doc["question"])
        both = [encode_text(tokenizer, doc["question"] + choice) for choice in doc["choices"]]
        items.append(MultipleChoice([*start, *question], [ids[len(question) :] for ids in both]))
    return score(model, items)


def check(
    scores: dict, samples: list[dict], ours: list[torch.Tensor], model: Transformer, docs: list[dict] = DOCS
) -> None:
    """The harness has our log-probabilities, and counts right answers as we would."""
    assert len(samples) == len(docs)
    for sample, mine in zip(samples, ours, strict=True):
        theirs = torch.tensor([float(value) for value, _ in sample["filtered_resps"]])
        torch.testing.assert_close(theirs, mine, atol=log_probability_rounding(model.config, 16), rtol=0)
    right = [int(mine.argmax()) == doc["answer"] for mine, doc in zip(ours, docs, strict=True)]
    assert scores["acc,none"] == pytest.approx(sum(right) / len(right))


def make(moe: bool = False) -> Transformer:
    torch.manual_seed(0)
    config = LMConfig(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, max_seq_len=256, initializer_range=0.15, use_moe=moe)
    return Transformer(config).eval()


def export(folder: Path, model: Transformer) -> Path:
    description = describe(Checkpoint(model, model.config, {}, folder, ""), "float32")
    with atomic_folder(folder, hidden=False) as tmp:
        write_llama(tmp, model, TOKENIZER_DIR, torch.float32, description)
    return folder


def ceval_items(model: Transformer) -> tuple[list[dict], list[MultipleChoice]]:
    """Return C-Eval questions as the harness' documents and as our items, chat and plain.

    The harness moves blanks from the end of a question to the choices, and cuts between tokens, where "：A" is one.
    """
    folder = ROOT / "dataset" / "sample" / "ceval"
    questions = read_questions(folder, "val", answers=True)[::20]
    examples = read_examples(folder, [question.subject for question in questions], 1)
    evaluated, docs, items = EvaluatedModel(model, load_tokenizer(), "", 256), [], []
    for question, plain in itertools.product(questions, [False, True]):
        shots = examples[question.subject]
        item, *_ = evaluated.to_multiple_choice(question, shots, "letter", plain)
        if plain:
            text, end = "<s>" + plain_prompt(question, shots, "letter"), "："
        else:
            chat = chat_prompt(question, shots, "letter")
            text, end = evaluated.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False), "\n"
            item = MultipleChoice(item.prompt[:-1], [[item.prompt[-1], *option] for option in item.options])
        items.append(item)
        choices, answer = [end + letter for letter in LETTERS], LETTERS.index(question.answer)
        docs.append({"question": text.removesuffix(end), "choices": choices, "answer": answer})
    return docs, items


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The running API server with the model of `make`: its address."""
    path = folder / "full_sft_64.pth"
    save_checkpoint(path, make(), info={})
    command = [sys.executable, ROOT / "my_openai_api.py", "--weights", path, "--dtype", "float32", "--port", 0]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            for line in process.stdout:
                if found := re.match(r"serving .* at (http://127.0.0.1:\d+)/v1", line):
                    break
            yield found[1]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """A folder of the results of the harness, with no hub in reach."""
    folder = tmp_path_factory.mktemp("lm_eval")
    dense, moe = export(folder / "dense_export", make()), export(folder / "moe_export", make(moe=True))
    on_folder = ("--model", "hf", "--device", "cpu", "--model_args")
    tokens = "tokenizer_backend=huggingface,tokenized_requests=True"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OPENAI_API_KEY": "none",
    }  # fmt: skip
    with serving(folder) as url:
        client = f"model=full_sft_64,base_url={url}/v1/completions,tokenizer={dense},{tokens}"
        commands = [
            *(
                prepare(
                    folder / name, *on_folder, f"pretrained={path},dtype=float32,add_bos_token=True", "--batch_size", 4
                )
                for name, path in (("dense", dense), ("moe", moe))
            ),
            prepare(
                folder / "ceval", *on_folder, f"pretrained={dense},dtype=float32,add_bos_token=False",
                docs=ceval_items(make())[0],
            ),
            prepare(
                folder / "server", "--model", "local-completions", "--batch_size", 2, "--model_args",
                f"{client},num_concurrent=2,max_retries=1,max_length=256",
            ),
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", HARNESS], input=json.dumps(commands), capture_output=True, text=True,
            env=environment, timeout=550, cwd=folder,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_exported_folder(evaluated, kind):
    model = make(moe=kind == "moe")
    check(*results(evaluated / kind), our_scores(model, [BOS_ID]), model)


def test_ceval(evaluated):
    """Our C-Eval gives the harness' numbers for the same texts, chat and plain, without a description or a delimiter."""
    model = make()
    docs, items = ceval_items(model)
    check(*results(evaluated / "ceval"), score(model, items), model, docs)


def test_running_server(evaluated):
    model = make()
    check(*results(evaluated / "server"), our_scores(model, []), model)
