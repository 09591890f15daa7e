"""serving/chat_model.py: prompts that fit, answers that can be paused, resumed and stopped."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from serving_helpers import IMAGE_IDS, SUM, answer_ids, png, scripted_outputs, tiny_model

from data_pipeline.image_records import parse_image_row
from data_pipeline.images import data_url, open_image
from evaluation.tools import chat_tools
from inference.generator import generate_text
from inference.model_loader import TextGenerator
from inference.options import SamplingParams
from inference.prompts import Prompt, chat_prompt, text_prompt
from model.chat_format import check_messages, render_chat, truncate_chat
from model.LMConfig import preset
from model.model import Transformer
from model.tokenizer import BOS_ID, EOS_ID, encode_text, load_tokenizer
from model.weights_file import Checkpoint
from serving.chat_model import CONTEXT, ENDED, LENGTH, ROUNDS, STOPPED, ChatModel, Conversation, Exchange
from serving.saved_chats import to_jsonl, to_markdown

TOKENIZER = load_tokenizer()
GREEDY = SamplingParams(max_new_tokens=12)


def make_model(endless: bool = False) -> Transformer:
    torch.manual_seed(0)
    config = preset("toy", dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=96, initializer_range=0.2)
    model = Transformer(config).eval()
    if endless:
        with torch.no_grad():
            model.output.weight[EOS_ID] = 0  # never the likeliest
    return model


@pytest.fixture(scope="module")
def model() -> ChatModel:
    model = make_model(endless=True)
    return ChatModel(TextGenerator(Checkpoint(model, model.config, {}, Path(), ""), TOKENIZER, 96), "tiny")


def finish(answer: Exchange) -> str:
    while answer.advance():
        pass
    return answer.text


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_chat_prompt_takes_the_turns_it_may():
    turns = chat("a", "b", "c", "d", "e", "f")
    limits = dict(context=96, max_new_tokens=12)
    for n, seen in ((0, []), (1, turns[4:]), (2, turns[2:]), (9, turns)):
        prompt = chat_prompt(TOKENIZER, turns, chat("last"), history_turns=n, system="short", **limits)
        messages = [{"role": "system", "content": "short"}, *seen, {"role": "user", "content": "last"}]
        assert prompt == Prompt(truncate_chat(TOKENIZER, messages, 84).ids, turns_seen=len(seen) // 2)


def test_chat_prompt_leaves_out_what_does_not_fit():
    turns = chat("word " * 70, "b", "c", "d")
    prompt = chat_prompt(TOKENIZER, turns, chat("last"), history_turns=5, context=96, max_new_tokens=12)
    assert (prompt.turns_seen, prompt.turns_left_out) == (1, 1) and len(prompt.ids) <= 84
    with pytest.raises(ValueError, match="48 is the limit"):  # half of the context is for the prompt
        chat_prompt(TOKENIZER, [], chat("word " * 60), history_turns=5, context=96, max_new_tokens=90)


def test_text_prompt_keeps_the_end():
    text = "one two three " * 30
    ids = encode_text(TOKENIZER, text)
    prompt = text_prompt(TOKENIZER, text, context=96, max_new_tokens=12)
    assert prompt.ids == [BOS_ID, *ids[-83:]] and prompt.tokens_left_out == len(ids) - 83
    assert text_prompt(TOKENIZER, "one", context=96, max_new_tokens=12).tokens_left_out == 0


def test_an_answer_is_that_of_the_decoder(model):
    conversation = Conversation()
    first = finish(conversation.ask("one", model, GREEDY, history_turns=3))
    second = finish(conversation.ask("two", model, GREEDY, history_turns=3))
    ids = [truncate_chat(TOKENIZER, messages, 84).ids for messages in (chat("one"), chat("one", first, "two"))]
    assert [first, second] == generate_text(model.generator.checkpoint.model, TOKENIZER, ids, GREEDY)
    assert conversation.turns() == chat("one", first, "two", second)


def test_why_it_ended(model):
    answer = Conversation().ask("hi", model, GREEDY)
    finish(answer)
    assert (answer.finish, answer.tokens, answer.rate > 0) == (LENGTH, 12, True)
    assert not answer.advance() and answer.tokens == 12
    answer = Conversation().ask("hi", model, SamplingParams(max_new_tokens=1000))
    finish(answer)
    assert answer.finish == CONTEXT and answer.tokens + answer.prompt_tokens == 96
    answer = Conversation().ask("hi", model, SamplingParams(max_new_tokens=90, stop=(answer.text[5:8],)))
    finish(answer)
    assert answer.finish == ENDED and 0 < answer.tokens < 90


def test_stop_keeps_what_was_written(model):
    conversation = Conversation()
    answer = conversation.ask("hi", model, SamplingParams(max_new_tokens=50))
    assert conversation.running and answer.running and answer.tokens == 0
    for _ in range(8):
        answer.advance()
    text = answer.text
    conversation.stop()
    assert answer.finish == STOPPED and not conversation.running
    assert not answer.advance() and (answer.text, answer.tokens) == (text, 8) and text
    assert conversation.turns() == chat("hi", text)
    conversation.stop()
    assert answer.finish == STOPPED


def test_regenerate_replaces_the_last_answer(model):
    conversation = Conversation()
    first = finish(first_exchange := conversation.ask("one", model, GREEDY))
    half = conversation.ask("two", model, GREEDY, history_turns=1)
    half.advance()
    second = conversation.regenerate(model, GREEDY, history_turns=1)
    assert half.finish == STOPPED and len(conversation.exchanges) == 2
    finish(second)
    assert conversation.turns() == chat("one", first, "two", second.text)
    alone = conversation.regenerate(model, GREEDY, history_turns=0)
    assert alone.prompt_tokens < second.prompt_tokens
    branch = conversation.branch(1)
    assert branch.exchanges == [first_exchange] and branch.id != conversation.id
    assert conversation.exchanges == [first_exchange, alone] and alone.running


def test_an_answer_stopped_before_its_first_token_is_no_part_of_what_was_said(model):
    conversation = Conversation()
    conversation.ask("hi", model, GREEDY)
    conversation.stop()
    assert conversation.exchanges[0].finish == STOPPED and conversation.turns() == []


def test_no_answer_is_no_part_of_what_was_said(model):
    conversation = Conversation()
    failed = conversation.ask("word " * 300, model, GREEDY)
    assert "84 is the limit" in failed.error and not failed.advance() and conversation.exchanges == [failed]
    assert conversation.turns() == [] and not conversation.running
    assert "not Unicode" in conversation.ask("half \ud800", model, GREEDY).error
    assert finish(conversation.ask("hi", model, GREEDY, history_turns=5))


def test_a_base_model_goes_on_with_the_text(model):
    base = ChatModel(model.generator, "base", continues=True)
    conversation = Conversation()
    finish(conversation.ask("hi", model, GREEDY))
    said = conversation.turns()
    text = finish(conversation.ask("The sun", base, GREEDY, history_turns=5, system="be kind"))
    ids = [BOS_ID, *encode_text(TOKENIZER, "The sun")]
    assert [text] == generate_text(base.generator.checkpoint.model, TOKENIZER, [ids], GREEDY)
    assert conversation.turns() == said  # no dialogue


def test_questions_about_images(model):
    tiny = tiny_model(sees=True)
    sees = ChatModel(TextGenerator(Checkpoint(tiny, tiny.config, {}, Path(), ""), TOKENIZER, 96))
    prepare = sees.generator.image_processor
    urls = [data_url(png(i)) for i in range(3)]
    shown = [open_image(png(i)) for i in range(3)]
    conversation = Conversation()
    first = finish(conversation.ask("one", sees, GREEDY, history_turns=3, images=urls[:2]))
    second = finish(conversation.ask("t\ufffcwo", sees, GREEDY, history_turns=3, images=urls[2:]))
    again = finish(conversation.regenerate(sees, GREEDY, history_turns=0))
    questions = chat("\ufffc\n\ufffc\none", first, "\ufffc\ntwo")
    for messages, images, answer in (
        (questions[:1], shown[:2], first), (questions, shown, second), (questions[2:], shown[2:], again),
    ):  # fmt: skip
        ids = truncate_chat(TOKENIZER, messages, 84, image_ids=IMAGE_IDS).ids
        assert generate_text(tiny, TOKENIZER, [ids], GREEDY, images=[prepare(images)]) == [answer]
    assert len({first, second, again}) == 3 and conversation.exchanges[1].images == urls[2:]
    messages, images = parse_image_row(json.loads(to_jsonl(conversation)), None)
    assert images == [png(i) for i in range(3)] and messages[:3] == questions
    assert f"![]({urls[2]})" in to_markdown(conversation, "me")
    assert "does not see images" in conversation.regenerate(model, GREEDY).error
    answer = conversation.ask("three", model, GREEDY, history_turns=5)  # a model of text reads the words alone
    alone = Conversation()
    alone.exchanges = [dataclasses.replace(exchange, images=[]) for exchange in conversation.exchanges[:-1]]
    assert finish(answer) == finish(alone.ask("three", model, GREEDY, history_turns=5))


class ScriptedModel:
    """A TextGenerator that writes given answers, one after the other."""

    tokenizer, image_processor, answer = TOKENIZER, None, TextGenerator.answer

    def __init__(self, *answers: list[int], context: int = 2000) -> None:
        self.answers, self.context, self.prompts = iter(answers), context, []

    def generate(self, prompt, sampling, images=None):
        self.prompts.append(prompt)
        return scripted_outputs(next(self.answers))


TOOLS = chat_tools(["calculator"])


def test_calls_are_run_and_answered():
    """And they are a part of what was said, also after saving."""
    called = dict(content="So:", reasoning_content="A sum.", tool_calls=[SUM])
    scripted = ScriptedModel(answer_ids(**called), answer_ids(content="27"), answer_ids(content="bye"))
    conversation = Conversation()
    exchange = conversation.ask("sum?", ChatModel(scripted), GREEDY, system="z", **TOOLS)
    assert finish(exchange) == "27" and exchange.finish == ENDED
    expected = [*chat("sum?"), {"role": "assistant", **called}, {"role": "tool", "content": "27"}, *chat("", "27")[1:]]
    assert conversation.turns() == expected
    assert exchange.tokens == len(answer_ids(**called)) + len(answer_ids(content="27"))
    asked = dict(history_turns=3, system="z", **TOOLS)
    finish(conversation.ask("thanks", ChatModel(scripted), GREEDY, **asked))
    system = {"role": "system", "content": "z", "tools": TOOLS["tools"]}
    for prompt, seen in zip(scripted.prompts, ([], expected[1:3], [*expected[1:], *chat("thanks")]), strict=True):
        assert prompt == render_chat(TOKENIZER, [system, expected[0], *seen], add_generation_prompt=True)[0]
    adapter = TypeAdapter(Conversation)
    assert adapter.validate_json(adapter.dump_json(conversation)).turns() == conversation.turns()
    assert json.loads(to_jsonl(conversation))["tools"] == TOOLS["tools"]


def test_calls_that_cannot_be_run_end_the_answer():
    call, seen = answer_ids(tool_calls=[SUM]), chat("sum?", "")
    without = Conversation()
    assert finish(without.ask("sum?", ChatModel(ScriptedModel(call)), GREEDY)).startswith("<tool_call>")
    assert without.turns() == chat("sum?", without.exchanges[0].text)  # no tools: it is text
    endless = Conversation()
    exchange = endless.ask("sum?", ChatModel(ScriptedModel(*[call] * 9)), GREEDY, **TOOLS)
    finish(exchange)
    assert exchange.finish == ROUNDS and len(exchange.called) == 2 * 8
    check_messages(endless.turns(), answered=True)
    full = Conversation()
    tools = TOOLS | {"call_tool": lambda call: "word " * 3000}
    exchange = full.ask("sum?", ChatModel(ScriptedModel(call)), GREEDY, **tools)
    finish(exchange)
    assert exchange.finish == CONTEXT and full.turns() == seen


def test_an_answer_that_fails_has_ended():
    class Failing(ScriptedModel):
        def generate(self, prompt, sampling, images=None):
            yield next(iter(scripted_outputs(answer_ids(content="27"))))
            raise RuntimeError("out of memory")

    exchange = Conversation().ask("sum?", ChatModel(Failing()), GREEDY)
    assert exchange.advance()
    with pytest.raises(RuntimeError, match="out of memory"):
        exchange.advance()
    assert exchange.finish == STOPPED and not exchange.running and not exchange.advance()


def test_two_conversations_at_once_do_not_mix(model):
    """Answers of one model taken in turn, token by token, in the one decoding thread."""
    alone = [finish(Conversation().ask(q, model, GREEDY)) for q in ("one", "two two")]
    with ThreadPoolExecutor(max_workers=1) as thread:
        shared = ChatModel(model.generator, thread=thread)
        answers = [Conversation().ask(q, shared, GREEDY) for q in ("one", "two two")]
        for _ in range(12):
            for answer in answers:
                answer.advance()
    assert [answer.text for answer in answers] == alone
