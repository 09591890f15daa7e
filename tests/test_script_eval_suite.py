"""eval_suite.py as users run it, on a few rows in the format of each data set: its results are those of lm-eval itself."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from launching import error_of
from test_interop_lm_eval import export, make

from common.errors import UserError
from model.weights_file import save_checkpoint

SCRIPT = "eval_suite.py"
TASKS = ["arc_easy", "piqa", "hellaswag", "openbookqa", "cmmlu_agronomy", "mmlu_anatomy"]
N = 12
NOUNS = "cat river lamp bread music winter engine cloud garden letter bridge moon stone".split()


def choices(i: int) -> list[str]:
    """Four answers of different lengths to question `i`."""
    return [" ".join(NOUNS[(i * (k + 2) + j) % 13] for j in range(1 + (i + k) % 4)) for k in range(4)]


def lettered(i: int) -> dict:
    return {"choices": {"text": choices(i), "label": list("ABCD")}, "answerKey": "ABCD"[i * 7 % 4]}


def rows_of(task: str, first: int = 0, n: int = N) -> list[dict]:
    """Return rows in the format of a data set on the hub."""
    rows = []
    for i in range(first, first + n):
        question, (a, b, c, d), answer = f"What is a {NOUNS[i % 13]} of {i}?", choices(i), i * 7 % 4
        rows.append(
            {
                "arc_easy": {"id": str(i), "question": question, **lettered(i)},
                "openbookqa": {"id": str(i), "question_stem": question, **lettered(i)},
                "piqa": {"goal": question, "sol1": a, "sol2": b, "label": answer % 2},
                "hellaswag": {
                    "ind": i, "activity_label": NOUNS[i % 13], "ctx_a": f"A man [title] sees a {NOUNS[i % 5]}.",
                    "ctx_b": "he", "endings": [a, b, c, d], "label": str(answer), "split": "val",
                },
                "cmmlu_agronomy": {
                    "": i, "Question": f"第{i}题：哪一个对？", "A": a, "B": b, "C": c, "D": d, "Answer": "ABCD"[answer],
                },
                "mmlu_anatomy": {"question": question, "subject": "anatomy", "choices": [a, b, c, d], "answer": answer},
            }[task]
        )  # fmt: skip
    return rows


FILES = {  # of the split that is evaluated, and of the examples
    "arc_easy": ("ai2_arc/ARC-Easy/test-00000-of-00001.parquet", "ai2_arc/ARC-Easy/train-00000-of-00001.parquet"),
    "piqa": ("piqa/validation.jsonl", "piqa/train.jsonl"),
    "hellaswag": ("hellaswag/hellaswag_val.jsonl", "hellaswag/hellaswag_train.jsonl"),
    "openbookqa": ("openbookqa/main/test-00000-of-00001.parquet", "openbookqa/main/train-00000-of-00001.parquet"),
    "cmmlu_agronomy": ("cmmlu/test/agronomy.csv", "cmmlu/dev/agronomy.csv"),
    "mmlu_anatomy": ("mmlu/anatomy/test-00000-of-00001.parquet", "mmlu/anatomy/dev-00000-of-00001.parquet"),
}


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    for task, (evaluated, examples) in FILES.items():
        write(folder / evaluated, rows_of(task))
        write(folder / examples, rows_of(task, first=20, n=5))
    write(folder / "ai2_arc/ARC-Challenge/test-00000-of-00001.parquet", rows_of("arc_easy", n=3))  # another subset
    write(folder / "openbookqa/additional/test-00000-of-00001.parquet", rows_of("openbookqa"))  # another one
    (folder / "piqa/README.md").write_text("---\n---\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "full_sft_64.pth"
    save_checkpoint(path, make(), info={"stage": "full_sft"})
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("exports") / "export", make())


@pytest.fixture(scope="module")
def harness(exported, data, tmp_path_factory) -> dict[int, dict]:
    """What lm-eval says about the exported model, with its own loading of the same files, by the number of examples."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from evaluation.suite import _task_manager

    tmp_path = tmp_path_factory.mktemp("harness")
    kinds = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}
    index = _task_manager().task_index
    for task, files in FILES.items():
        evaluated = "validation" if task in ("piqa", "hellaswag") else "test"
        examples = "dev" if task in ("cmmlu_agronomy", "mmlu_anatomy") else "train"
        paths = dict(zip((evaluated, examples), map(str, (data / file for file in files)), strict=True))
        local = {
            "include": str(index[task].yaml_path), "task": f"local_{task}", "dataset_name": None,
            "dataset_path": kinds[Path(files[0]).suffix],
            "dataset_kwargs": {"data_files": paths, "cache_dir": str(tmp_path / "cache")},
        }  # fmt: skip
        (tmp_path / f"{task}.yaml").write_text(json.dumps(local), encoding="utf-8")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    lm = HFLM(pretrained=str(exported), dtype="float32", device="cpu", add_bos_token=True, batch_size=4)
    tasks = [f"local_{task}" for task in FILES]
    return {
        shots: simple_evaluate(model=lm, tasks=tasks, num_fewshot=shots, task_manager=manager)["results"]
        for shots in (0, 2)
    }


@pytest.mark.parametrize("shots", [0, 2])
def test_results_are_those_of_the_harness(run_here, harness, data, weights, exported, tmp_path, shots):
    theirs = harness[shots]
    for name, flags in (("ours", ["--weights", weights]), ("exported", ["--hf", exported])):
        out = tmp_path / name
        flags += ["--tasks", *TASKS, "--data_dir", data, "--out_dir", out, "--shots", shots, "--device", "cpu"]
        result = run_here(SCRIPT, *flags)
        assert result.returncode in (0, None), result.stderr
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        assert list(summary["tasks"]) == TASKS and summary["questions_cut"] == 0
        for task, one in summary["tasks"].items():
            expected = theirs[f"local_{task}"]
            assert one["accuracy"] == expected["acc,none"], task
            assert one["standard_error"] == pytest.approx(expected["acc_stderr,none"])
            assert one.get("normalised_accuracy") == expected.get("acc_norm,none"), task
            assert one["questions"] == N and one["chance"] == (1 / 2 if task == "piqa" else 1 / 4)
            assert f"{one['accuracy']:8.1%}" in next(line for line in result.stdout.splitlines() if line.endswith(task))
    assert len({one["acc,none"] for one in theirs.values()}) > 2  # tasks that all agree would prove little


def test_a_group_and_a_tag(run_here, data, weights, tmp_path):
    """ARC is a tag, the social sciences of MMLU are a group: its accuracy counts every question once."""
    from evaluation.suite import _task_manager

    folder = tmp_path / "data"
    for i, task in enumerate(sorted(_task_manager().task_index["mmlu_social_sciences_tasks"].tags)):
        subject = task.removeprefix("mmlu_")
        write(folder / f"mmlu/{subject}/test-00000-of-00001.parquet", rows_of("mmlu_anatomy", first=i, n=1 + i))
    write(folder / FILES["arc_easy"][0], rows_of("arc_easy"))
    write(folder / "ai2_arc/ARC-Challenge/test-00000-of-00001.parquet", rows_of("arc_easy", n=1))
    flags = ["--weights", weights, "--data_dir", folder, "--out_dir", tmp_path, "--device", "cpu"]
    result = run_here(SCRIPT, "--tasks", "mmlu_social_sciences", "ai2_arc", *flags)
    assert result.returncode in (0, None), result.stderr
    found = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["tasks"]
    parts = [one for name, one in found.items() if name.startswith("mmlu_") and name != "mmlu_social_sciences"]
    group = found["mmlu_social_sciences"]
    assert group["questions"] == sum(one["questions"] for one in parts) == sum(range(1, len(parts) + 1))
    right = sum(one["accuracy"] * one["questions"] for one in parts)
    assert group["accuracy"] == pytest.approx(right / group["questions"])
    assert found["arc_challenge"]["questions"] == 1 and found["arc_challenge"]["standard_error"] is None
    assert found["arc_easy"]["questions"] == N and "mmlu_sociology" in result.stdout


def test_prompts_that_are_too_long_are_cut(run_here, data, weights, tmp_path):
    flags = ["--weights", weights, "--data_dir", data, "--out_dir", tmp_path, "--device", "cpu", "--max_seq_len", "24"]
    result = run_here(SCRIPT, "--tasks", "arc_easy", "--shots", "3", "--limit", "5", *flags)
    assert result.returncode in (0, None), result.stderr
    assert "warning: 5 prompts are longer than 24 tokens" in result.stdout
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["tasks"]["arc_easy"]["questions"] == 5


# ---- errors


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "--tasks is missing"),
        (["--tasks", "arc_eazy"], "lm-eval has no such task; did you mean arc_easy"),
        (["--tasks", "gsm8k"], "gsm8k: only multiple-choice tasks"),
        (["--tasks", "boolq"], "no files of the split validation of boolq in"),
        (["--tasks", "mmlu_virology"], "no files of the split test of virology in"),
        (["--tasks", "arc_challenge", "--shots", "1"], "no files of the split train of ARC-Challenge in"),
    ],
)
def test_wrong_flags_and_missing_files(run_here, data, weights, tmp_path, flags, reason):
    result = run_here(SCRIPT, "--data_dir", data, "--weights", weights, "--out_dir", tmp_path / "out", *flags)
    assert reason in error_of(result) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": 2}, "piqa, row 2: the answer 2 is none of 0, 1, '"),
        ({"label": "x"}, "piqa: the rows in .* are not those of this task"),
    ],
)
def test_wrong_rows(tmp_path, change, reason):
    from evaluation.suite import load_tasks

    first, second = rows_of("piqa", n=2)
    write(tmp_path / "piqa" / "validation.jsonl", [first, second | change])
    with pytest.raises(UserError, match=reason):
        load_tasks(["piqa"], tmp_path, None)


def test_too_few_rows_for_the_examples(tmp_path):
    from evaluation.suite import load_tasks

    write(tmp_path / "piqa" / "validation.jsonl", rows_of("piqa", n=2))
    write(tmp_path / "piqa" / "train.jsonl", rows_of("piqa", n=2))
    load_tasks(["piqa"], tmp_path, 1)
    with pytest.raises(UserError, match="piqa: 2 examples are too many for 2 rows"):
        load_tasks(["piqa"], tmp_path, 2)


def test_a_task_without_accuracy_is_refused(tmp_path):
    from evaluation.suite import load_tasks

    write(tmp_path / "glue" / "cola" / "validation.jsonl", [{"sentence": "It rains.", "label": 1}] * 2)
    with pytest.raises(UserError, match="cola: only accuracy can be measured, and the task has mcc"):
        load_tasks(["cola"], tmp_path, None)


def test_a_broken_line_and_a_missing_column(tmp_path):
    from evaluation.suite import load_tasks

    path = tmp_path / "piqa" / "validation.jsonl"
    write(path, rows_of("piqa"))
    path.write_text(path.read_text(encoding="utf-8").replace("}\n", "\n", 1), encoding="utf-8")
    with pytest.raises(UserError, match="validation.jsonl, line 1: "):
        load_tasks(["piqa"], tmp_path, None)
    write(path, [{"goal": "x", "label": 0}])
    with pytest.raises(UserError, match="piqa: the rows in .* are not those of this task"):
        load_tasks(["piqa"], tmp_path, None)


def test_without_lm_eval(run_here, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    assert "pip install -r requirements-suite.txt" in error_of(run_here(SCRIPT, "--tasks", "arc_easy"))
