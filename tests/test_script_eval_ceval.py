"""eval_ceval.py as users run it, and the arithmetic behind its tables."""

import csv
import functools
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from launching import ROOT, error_of, run
from tolerances import rounding

from common.errors import UserError
from evaluation.ceval import Question, answer_texts, chat_prompt, plain_prompt, question_text, read_questions
from evaluation.ceval_results import CHINESE_FONTS, accuracy, draw, official_subjects, results_table, summarize
from evaluation.evaluated_model import EvaluatedModel
from evaluation.scoring import MultipleChoice, score
from model.chat_format import render_chat
from model.LMConfig import preset
from model.model import Transformer
from model.tokenizer import encode_text, load_tokenizer
from model.weights_file import save_checkpoint

SCRIPT = "eval_ceval.py"
HEADER = "id,question,A,B,C,D,answer\n"
Q = Question("law", "0", "1+1=?", ("2", "3", "4", "5"), "A")
EXAMPLE = Question("law", "0", "天为何色？", ("红", "蓝", "绿", "黄"), "B")


@pytest.fixture
def ceval(run_here) -> Callable[..., subprocess.CompletedProcess]:
    return functools.partial(run_here, SCRIPT, "--device", "cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A tiny model with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("out") / "full_sft_64.pth"
    model = Transformer(preset("toy", dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=96))
    torch.nn.init.normal_(model.tok_embeddings.weight, std=0.5)
    save_checkpoint(path, model, info={"stage": "full_sft"})
    return path


@pytest.fixture
def quiz(tmp_path) -> Path:
    """Two subjects with validation questions, examples and test questions."""
    folder = tmp_path / "quiz"
    for part in ("val", "dev", "test"):
        (folder / part).mkdir(parents=True)
        for subject in ("law", "college_physics"):
            rows = [f"{i},{subject} 第{i}题？,甲{i},乙,丙丙,丁,{'ABCD'[i % 4]}" for i in range(6)]
            if part == "test":
                rows = [row[:-2] for row in rows]
            head = HEADER.replace(",answer", "") if part == "test" else HEADER
            (folder / part / f"{subject}_{part}.csv").write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    return folder


def answered(*groups: tuple[str, int, int]) -> pd.DataFrame:
    """Results of questions: subject, how many right, how many wrong."""
    rows = [
        (Question(subject, "0", "?", ("1", "2", "3", "4"), "B"), (-3, -1, -3, -3) if i < right else (-1, -3, -3, -3))
        for subject, right, wrong in groups
        for i in range(right + wrong)
    ]
    return results_table(*zip(*rows, strict=True))


# ---- arithmetic and text


def test_categories_are_the_official_ones():
    official = official_subjects()
    assert len(official) == 52 and official.index.is_unique and official["name"].is_unique
    sizes = {"STEM": 20, "Social science": 10, "Humanities": 11, "Other": 11}
    assert official.groupby("category", sort=False).size().to_dict() == sizes
    assert set(official.index[official["hard"]]) == {
        "advanced_mathematics", "discrete_mathematics", "probability_and_statistics", "college_physics",
        "college_chemistry", "high_school_mathematics", "high_school_physics", "high_school_chemistry",
    }  # fmt: skip


def test_accuracy_and_standard_error():
    one = accuracy(pd.Series([1] * 40 + [0] * 60))
    assert one["accuracy"] == 0.4 and one["standard_error"] == pytest.approx(math.sqrt(0.4 * 0.6 / 100))
    assert one["above_chance"] and not accuracy(pd.Series([1] * 33 + [0] * 67))["above_chance"]  # guessing: 25% +- 4.3%


def test_summary():
    found = summarize(answered(("law", 3, 1), ("college_physics", 1, 1), ("fruit", 0, 2)))
    assert found["overall"]["accuracy"] == 0.5 and found["overall"]["questions"] == 8
    assert found["subject_mean"] == pytest.approx((0.75 + 0.5 + 0) / 3)
    categories = {name: (one["correct"], one["questions"]) for name, one in found["categories"].items()}
    assert list(categories.items()) == [
        ("STEM", (1, 2)), ("Humanities", (3, 4)), ("Hard", (1, 2)), ("Own quiz", (0, 2)),
    ]  # fmt: skip
    assert found["subjects"]["law"]["name"] == "法学" and found["subjects"]["fruit"]["name"] == ""
    json.dumps(found)  # plain values only


def test_probabilities_are_of_the_four_options():
    results = results_table([Q], [(math.log(0.2), math.log(0.1), math.log(0.06), math.log(0.04))])
    assert results.loc[0, ["p_A", "p_B", "p_C", "p_D"]].tolist() == pytest.approx([0.5, 0.25, 0.15, 0.1])


def test_prompts():
    asked = "1+1=?\nA. 2\nB. 3\nC. 4\nD. 5\n答案："
    assert chat_prompt(Q, [], "letter") == [{"role": "user", "content": asked}]
    assert chat_prompt(Q, [EXAMPLE], "letter")[1:] == [
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": asked},
    ]
    shot = "天为何色？\nA. 红\nB. 蓝\nC. 绿\nD. 黄\n答案：B\n\n"
    assert plain_prompt(Q, [EXAMPLE], "letter") == shot + asked
    assert plain_prompt(Q, [EXAMPLE], "text") == "天为何色？\n答案：蓝\n\n1+1=?\n答案："
    assert [m["content"] for m in chat_prompt(Q, [EXAMPLE], "text")] == ["天为何色？", "蓝", "1+1=?"]


def test_format_of_the_sample_quiz():
    """The training data of dataset/sample ask as the evaluation does."""
    rows = (ROOT / "dataset" / "sample" / "sft_data_zh.jsonl").read_text(encoding="utf-8").splitlines()
    asked = next(json.loads(row)["instruction"] for row in rows if "\\nD. " in row)
    question, *options, end = asked.split("\n")
    made = Question("x", "0", question, tuple(option[3:] for option in options), "A")
    assert end == "答案：" and chat_prompt(made, [], "letter")[0]["content"] == asked


# ---- tokens


def tokenizations(text: bytes, tokens: dict[bytes, int]) -> list[list[int]]:
    """Every sequence of tokens that spells `text`."""
    if not text:
        return [[]]
    starts = [n for n in range(1, len(text) + 1) if text[:n] in tokens]
    return [[tokens[text[:n]], *rest] for n in starts for rest in tokenizations(text[n:], tokens)]


@pytest.mark.parametrize("style", ["letter", "text"])
def test_plain_answers_have_their_probability_over_all_tokenizations(style):
    """A model that learned the quiz by heart: no other tokenization of an answer adds anything to what is scored."""
    tokenizer = load_tokenizer()
    questions = read_questions(ROOT / "dataset" / "sample" / "ceval", "val", answers=True, subjects=["sample_science"])[
        :6
    ]
    torch.manual_seed(0)
    model = Transformer(preset("toy", dim=64, n_layers=1, n_heads=4, n_kv_heads=2, max_seq_len=256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    end = "" if style == "letter" else "\n答案："
    texts = [f"{question_text(q, style)}{end}{answer_texts(q, style)['ABCD'.index(q.answer)]}\n\n" for q in questions]
    rows = [[1, *encode_text(tokenizer, text)] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    for _ in range(80):
        model(ids, labels=ids.masked_fill(ids == 0, -100), loss_only=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    tokens = {tokenizer.decode([i]).encode(): i for i in range(len(tokenizer))}
    tokens = {text: i for text, i in tokens.items() if "\ufffd" not in text.decode()}  # whole characters
    evaluated, n_ways = EvaluatedModel(model, tokenizer, "toy", 256), []
    for question in questions:
        item, *_ = evaluated.to_multiple_choice(question, [], style, plain=True)
        texts = [plain_prompt(question, [], style) + answer for answer in answer_texts(question, style)]
        assert [item.prompt + option for option in item.options] == [[1, *encode_text(tokenizer, t)] for t in texts]
        start = item.prompt[: len(item.prompt) - 1]
        before = tokenizer.decode(start[1:])
        found = score(model, [MultipleChoice(start, [[item.prompt[-1], *option] for option in item.options])])[0].exp()
        for text, one in zip(texts, found, strict=True):
            assert text.startswith(before)
            ways = tokenizations(text.removeprefix(before).encode(), tokens)
            total = score(model, [MultipleChoice(start, ways)])[0].exp().sum()
            assert total < 1e-3 or one > 0.99 * total
            n_ways.append(len(ways))
        assert found.sum() > 0.5  # the model knows that one of the four comes
        assert "ABCD"[int(found.argmax())] == question.answer
    assert max(n_ways) >= 4


def test_bytes_of_the_prompt_that_are_scored_are_counted():
    model = EvaluatedModel(None, load_tokenizer(), "", 96)
    latin = Question("law", "0", "天为何色？", ("A", "红色", "B", "蓝"), "A")  # "：A" is one token
    item, *_ = model.to_multiple_choice(latin, [], "text", plain=True)
    assert model.tokenizer.decode(item.prompt).endswith("\n答案")
    assert [model.tokenizer.decode(option) for option in item.options] == ["：A", "：红色", "：B", "：蓝"]
    assert item.lengths == [4, 9, 4, 6]


# ---- reading


def test_reading(quiz):
    found = read_questions(quiz, "val", answers=True)
    assert [q.subject for q in found] == ["college_physics"] * 6 + ["law"] * 6
    assert found[7] == Question("law", "1", "law 第1题？", ("甲1", "乙", "丙丙", "丁"), "B")
    assert {q.subject for q in read_questions(quiz, "val", answers=True, subjects=["law"])} == {"law"}
    assert read_questions(quiz, "test", answers=False)[0].answer == ""


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("shopping.csv", "milk,eggs\n1,2\n", "files that are not of C-Eval: shopping.csv"),
        (
            "art_val.csv",
            "milk,eggs\n1,2\n",
            "art_val.csv: no column id, question, A, B, C, D, answer; it has milk, eggs",
        ),
        ("art_val.csv", "id,question,A,B,C,D\n0,?,1,2,3,4\n", "art_val.csv: no column answer"),
        (
            "art_val.csv",
            HEADER + "0,?,1,2,3,4,A\n1,?,1,2,3,4,E\n",
            "art_val.csv, line 3: the answer is 'E', not one of",
        ),
        ("art_val.csv", HEADER + "0,?,1,2,3,4,AB\n", "line 2: the answer is 'AB'"),
        ("art_val.csv", HEADER + "0,?,1,2,3,A\n", "art_val.csv, line 2: 6 fields where the header has 7"),
        ("art_val.csv", HEADER + "0,,1,2,3,4,A\n", "line 2: nothing in column question"),
        ("art_val.csv", HEADER + "0,?,1,2,3,4,A\n0,?,1,2,3,4,A\n", "line 3: the id 0 is already used in line 2"),
        ("art_val.csv", HEADER, "art_val.csv: no questions in it|no rows in it"),
        ("art_val.csv", "题目".encode("gbk"), "art_val.csv, line 1: "),
    ],
)
def test_bad_files_are_named(quiz, name, content, reason):
    data = content if isinstance(content, bytes) else content.encode()
    (quiz / "val" / name).write_bytes(data)
    with pytest.raises(UserError, match=reason):
        read_questions(quiz, "val", answers=True)


def test_missing_folder_says_where_to_get_the_data(tmp_path):
    with pytest.raises(UserError, match="huggingface.co/datasets/ceval/ceval-exam"):
        read_questions(tmp_path, "val", answers=True)
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="no file .*_val.csv.*huggingface.co"):
        read_questions(tmp_path, "val", answers=True)


# ---- the script


def results(out: Path, subject: str) -> list[dict]:
    with open(out / f"{subject}_result.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_answers_are_those_of_the_model(weights, quiz, tmp_path):
    """In a process of its own."""
    out = tmp_path / "out"
    ran = run(SCRIPT, "--device", "cpu", "--weights", weights, "--data_dir", quiz, "--out_dir", out)
    assert ran.returncode == 0, ran.stderr
    assert "guessing: 25.0%" in ran.stdout and "law 法学" in ran.stdout and "warning" not in ran.stdout
    assert sorted(p.name for p in out.iterdir()) == [
        "ceval.png", "college_physics_result.csv", "law_result.csv", "summary.json",
    ]  # fmt: skip
    assert (out / "ceval.png").read_bytes().startswith(b"\x89PNG")

    tokenizer = load_tokenizer()
    model = Transformer(preset("toy", dim=64, n_layers=2, n_heads=4, n_kv_heads=2)).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    letters = [encode_text(tokenizer, letter)[0] for letter in "ABCD"]
    correct = 0
    for q in read_questions(quiz, "val", answers=True):
        ids, _ = render_chat(tokenizer, chat_prompt(q, [], "letter"), add_generation_prompt=True)
        with torch.inference_mode():
            shares = model(torch.tensor([ids])).logits[0, -1, letters].softmax(-1)
        row = results(out, q.subject)[int(q.id)]
        assert row["prediction"] == "ABCD"[int(shares.argmax())] and row["answer"] == q.answer
        assert [float(row[f"p_{c}"]) for c in "ABCD"] == pytest.approx(shares.tolist(), abs=rounding(torch.bfloat16))
        correct += row["prediction"] == row["answer"]
        assert row["correct"] == str(int(row["prediction"] == row["answer"]))
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (summary["overall"]["correct"], summary["overall"]["questions"]) == (correct, 12)


def test_examples_and_cutting(weights, quiz, tmp_path, ceval):
    """Examples that do not fit are left out and counted, then the question is cut from the left and counted."""
    with open(quiz / "val" / "law_val.csv", "a", encoding="utf-8") as file:
        file.write(f"6,{'很长的题目' * 60},甲,乙,丙,丁,A\n")
    out = tmp_path / "out"
    flags = ["--plain", "--score", "text", "--shots", "5", "--subjects", "law", "--dtype", "float32"]
    ran = ceval("--weights", weights, "--data_dir", quiz, "--out_dir", out, *flags)
    assert ran.returncode == 0, ran.stderr
    assert "warning: 1 of 7 questions are longer than 96 tokens: cut from the left" in ran.stdout
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["questions_cut"] == 1 and summary["examples_left_out"] >= 5
    assert (summary["shots"], summary["score"], summary["format"], summary["dtype"]) == (5, "text", "plain", "float32")


def test_submission(weights, quiz, tmp_path, ceval):
    out = tmp_path / "out"
    ran = ceval("--weights", weights, "--data_dir", quiz, "--out_dir", out, "--test")
    assert ran.returncode == 0, ran.stderr
    assert [p.name for p in out.iterdir()] == ["submission.json"]
    submission = json.loads((out / "submission.json").read_text(encoding="utf-8"))
    assert list(submission) == ["college_physics", "law"] and list(submission["law"]) == list("012345")
    assert set(submission["law"].values()) <= set("ABCD")


def test_bad_input_leaves_nothing_behind(weights, quiz, tmp_path, ceval):
    out, broken = tmp_path / "out", tmp_path / "broken.pth"
    broken.write_bytes(weights.read_bytes()[:5000])
    assert "broken.pth " in error_of(ceval("--weights", broken, "--data_dir", quiz, "--out_dir", out))
    assert "no config.json" in error_of(ceval("--hf", tmp_path, "--data_dir", quiz, "--out_dir", out))
    rows = HEADER + "0,一？,甲,,丙,丁,A\n"
    (quiz / "val" / "law_val.csv").write_text(rows, encoding="utf-8")
    message = error_of(ceval("--weights", weights, "--data_dir", quiz, "--out_dir", out, "--score", "text"))
    assert "law_val.csv, line 2: an option is empty" in message
    assert not out.exists()
    ran = ceval("--weights", weights, "--data_dir", quiz, "--out_dir", out)  # letters can be compared, and it is said
    assert ran.returncode == 0 and "warning: 1 of 7 questions have an empty option, the first: " in ran.stdout
    assert "law_val.csv, line 2\n" in ran.stdout


@pytest.mark.parametrize("there", [True, False], ids=["fonts", "no fonts"])
def test_chart_of_subjects_in_chinese(there, tmp_path, monkeypatch, capsys, recwarn):
    """A font that has the characters is used where there is one; where there is none, that is said."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names()) & set(CHINESE_FONTS)
    if there and not installed:
        pytest.skip("no font with Chinese characters is installed")
    if not there:
        monkeypatch.setattr(font_manager, "get_font_names", lambda: ["DejaVu Sans"])
    summary = summarize(answered(("语文_$x_{$", 3, 1)))
    draw({"model": "a.pth", **summary}, tmp_path / "ceval.png")
    assert (tmp_path / "ceval.png").read_bytes().startswith(b"\x89PNG")
    assert ("no font on this machine" in capsys.readouterr().out) == (not there)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_other_model_of_transformers(quiz, tmp_path, ceval):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, out = tmp_path / "llama", tmp_path / "out"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    ran = ceval("--hf", folder, "--data_dir", quiz, "--out_dir", out, "--subjects", "law")
    assert ran.returncode == 0, ran.stderr
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["overall"]["questions"] == 6


def test_a_subject_named_twice_counts_once_and_old_results_go(weights, quiz, tmp_path, ceval):
    out = tmp_path / "out"
    assert ceval("--weights", weights, "--data_dir", quiz, "--out_dir", out).returncode == 0
    (out / "my_result.csv").write_text("not,one,of,ours\n")
    assert ceval("--weights", weights, "--data_dir", quiz, "--out_dir", out, "--subjects", "law", "law").returncode == 0
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["overall"]["questions"] == 6
    assert sorted(path.name for path in out.glob("*.csv")) == ["law_result.csv", "my_result.csv"]


def test_one_model_at_a_time(weights, quiz, tmp_path, ceval):
    result = ceval("--weights", weights, "--hf", tmp_path, "--data_dir", quiz, "--out_dir", tmp_path / "out")
    assert result.returncode == 2 and "--weights and --hf name different models" in result.stderr


def test_an_out_dir_that_cannot_be_is_found_before_any_work(weights, quiz, tmp_path, ceval):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = ceval("--weights", weights, "--data_dir", quiz, "--out_dir", out)
        assert result.returncode == 2 and result.stdout == "" and result.stderr.startswith(f"error: --out_dir {out}: ")
