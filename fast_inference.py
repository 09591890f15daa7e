"""Talk to the models in out/ on a web page, on this machine: chat with history, or texts that a base model goes on with.

    streamlit run fast_inference.py
    streamlit run fast_inference.py -- --out_dir out/quickstart --temperature 0
    python fast_inference.py --weights out/full_sft_512.pth         # the same as streamlit run

Streamlit's own flags come before the two dashes: streamlit run fast_inference.py --server.port 8502 -- --out_dir out
Streamlit runs `main` from top to bottom at every click; what has to last is in `st.session_state`, one for each browser
tab. An answer that is being written lasts too, and each run goes on with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import streamlit as st
import torch
from streamlit.delta_generator import DeltaGenerator

from common.cli import Parser
from common.errors import UserError, run_script
from inference.model_finder import EXPORT, Entry, default_model, list_models, read_entry
from inference.model_loader import TextGenerator, load_text_generator
from inference.options import SamplingParams, add_model_flags, add_sampling_flags, sampling_from_args
from inference.terminal import visible
from model.model import parameter_counts
from serving.chat_model import Answer, ChatModel, Conversation, Exchange
from serving.web.page import (
    COPY_CSS,
    COPY_HTML,
    COPY_JS,
    STYLE,
    answer_facts,
    empty_html,
    facts_html,
    left_out_note,
    literal,
    size_text,
    text_html,
    title_html,
)
from serving.web.texts import LANGUAGES, Texts, language_of

LOOK_SECONDS = 3  # between looks into the folder of models
DRAW_SECONDS = 0.05  # between two states of a growing answer
MODELS_KEPT = 4  # in memory, the last used


class PageParser(Parser):
    """Wrong flags become one line in the page, where they are read; argparse would end the process."""

    def error(self, message: str) -> None:
        raise UserError(message)

    def print_help(self, file=None) -> None:
        if not st.runtime.exists():
            return super().print_help(file)
        st.code(self.format_help(), language=None)
        return st.stop()


def parse_args() -> argparse.Namespace:
    parser = PageParser(description=__doc__)
    parser.add_argument(
        "--history_turns", type=int, default=5, metavar="N", help="earlier turns it sees, to begin with (default: 5)"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message, to begin with")
    parser.add_argument(
        "--language",
        choices=["auto", *LANGUAGES],
        default="auto",
        help="of the page; auto: the browser's (default: auto)",
    )
    add_model_flags(
        parser, stages="of rl_*.pth, full_sft_*.pth and lora_* in OUT_DIR; or an adapter or exported folder"
    )
    add_sampling_flags(parser, temperature=0.7, top_p=0.9)
    args = parser.parse_args()
    if args.history_turns < 0:
        raise UserError(f"--history_turns {args.history_turns} must not be negative")
    if args.weights is not None and read_entry(args.weights) is None:
        raise UserError(f"--weights {args.weights} is no .pth file, adapter or exported folder")
    sampling_from_args(args)
    return args


# ---- models


def available(args: argparse.Namespace) -> list[Entry]:
    """--weights if given, then what is in --out_dir."""
    named = read_entry(args.weights) if args.weights is not None else None
    found = list_models(args.out_dir)
    if named is None:
        return found
    return [named, *(entry for entry in found if entry.path.resolve() != named.path.resolve())]


@st.cache_resource(max_entries=MODELS_KEPT, show_spinner=False)
def load(_args: argparse.Namespace, path: Path, stamp: tuple, flags: str) -> TextGenerator:
    """Read a model, once for all sessions; again if one of its files changed. `path`, `stamp` and `flags` are the key.

    Raises UserError or OSError with what is wrong with it.
    """
    return load_text_generator(path, _args)


@st.cache_resource(show_spinner=False)
def decoding_thread() -> Executor:
    """The one thread in which all sessions' tokens are computed, in turn."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoding")


# ---- the parts of the page


def choose_language(args: argparse.Namespace) -> Texts:
    if "language" not in st.session_state:
        st.session_state.language = language_of(st.context.locale) if args.language == "auto" else args.language
    texts = Texts(st.session_state.language)
    st.segmented_control(
        texts("language"), list(LANGUAGES), format_func=LANGUAGES.get, key="language", required=True,
        label_visibility="collapsed", width="stretch",
    )  # fmt: skip
    return texts


def stage_text(entry: Entry, texts: Texts) -> str:
    known = {stage: texts(f"stage_{stage}") for stage in ("pretrain", "full_sft", "rl", "lora")}
    return known.get(entry.stage, entry.stage or texts("stage_unknown"))


def choose_model(args: argparse.Namespace, texts: Texts) -> Entry | None:
    """The picker; None if there is nothing to pick."""
    entries = available(args)
    watch(args, entries)
    if not entries:
        return None
    by_path = {str(entry.path): entry for entry in entries}
    if st.session_state.get("model") not in by_path:
        first = entries[0] if args.weights is not None else default_model(entries)
        st.session_state.model = str(first.path)
    path = st.selectbox(
        texts("model"), list(by_path), key="model", help=literal(texts("model_help", folder=args.out_dir)),
        format_func=lambda path: f"{Path(path).name} · {stage_text(by_path[path], texts)}",
    )  # fmt: skip
    return by_path[path]


@st.fragment(run_every=LOOK_SECONDS)
def watch(args: argparse.Namespace, shown: list[Entry]) -> None:
    """Draw the page again when the folder of models is no longer as `shown`."""
    if available(args) != shown:
        st.rerun()


def loaded_model(entry: Entry, args: argparse.Namespace, texts: Texts) -> TextGenerator | None:
    """The model; None, and the reason is on the page, if it cannot be loaded."""
    try:
        with st.spinner(literal(texts("loading", name=entry.path.name))):
            return load(args, entry.path, entry.stamp, str(vars(args)))
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        reason = visible(str(error)).strip().partition("\n")[0]
        st.error(literal(texts("cannot_load", name=entry.path.name, reason=reason)), icon=":material/error:")
        return None


def show_facts(entry: Entry, loaded: TextGenerator | None, texts: Texts) -> None:
    """What is known of the chosen model."""
    first = [stage_text(entry, texts), *([texts("exported")] if entry.kind == EXPORT else [])]
    first += [texts("on_base", base=entry.base)] if entry.base else []
    second = [texts("size", size=size_text(entry.size))]
    second += [texts("loss", loss=entry.loss)] if entry.loss is not None else []
    second += [texts("step", step=entry.step)] if entry.step is not None else []
    lines = [" · ".join(first), " · ".join(second)]
    if loaded is not None:
        weight = loaded.checkpoint.model.get_input_embeddings().weight
        millions = parameter_counts(loaded.checkpoint.model)["total"] / 1e6
        dtype = str(weight.dtype).removeprefix("torch.")
        lines.append(f"{texts('parameters', millions=millions)} · {dtype} · {weight.device}")
        lines.append(texts("context", context=loaded.context))
        trained = loaded.checkpoint.config.max_seq_len
        lines += [texts("beyond_trained", trained=trained)] if loaded.context > trained else []
        lines += loaded.checkpoint.notes
    st.html(facts_html(*map(visible, lines)))


def choose_settings(
    args: argparse.Namespace, texts: Texts, context: int, chats: bool
) -> tuple[SamplingParams, int, str]:
    """The sliders: how tokens are chosen, how many earlier turns are seen, the system message."""

    def ask(kind, key: str, **how):
        st.session_state.setdefault(key, getattr(args, key))
        return kind(texts(key), key=key, help=texts(f"{key}_help"), **how)

    def slide(key: str, low: float, high: float, step: float):
        """A value outside (from a flag, or because the context is another one) moves the end, or comes inside it."""
        low, high = min(low, getattr(args, key)), max(high, getattr(args, key))
        return ask(st.slider, key, min_value=low, max_value=high, step=step)

    with st.expander(texts("sampling"), expanded=True):
        chosen = {
            "temperature": slide("temperature", 0.0, 2.0, 0.05),
            "top_p": slide("top_p", 0.05, 1.0, 0.05),
            "top_k": slide("top_k", 0, 200, 1),
        }
        longest = max(context - 1, 2)
        wanted = st.session_state.get("max_new_tokens", args.max_new_tokens)
        st.session_state.max_new_tokens = min(wanted, longest)
        chosen["max_new_tokens"] = ask(st.slider, "max_new_tokens", min_value=1, max_value=longest, step=1)
        chosen["repetition_penalty"] = slide("repetition_penalty", 1.0, 2.0, 0.01)
        chosen["seed"] = ask(
            st.number_input,
            "seed",
            value=None,
            min_value=0,
            max_value=2**53 - 1,
            step=1,
            placeholder=texts("seed_empty"),
        )
    history_turns, system = 0, ""
    if chats:
        with st.expander(texts("conversation"), expanded=True):
            history_turns = slide("history_turns", 0, 20, 1)
            st.session_state.setdefault("system", args.system or "")
            system = ask(st.text_area, "system", placeholder=texts("system_empty"), height=80)
    return dataclasses.replace(sampling_from_args(args), **chosen), history_turns, system


def show_nothing_there(args: argparse.Namespace, texts: Texts) -> None:
    st.warning(literal(texts("no_models", folder=args.out_dir)), icon=":material/inbox:")
    st.markdown(texts("no_models_next"))
    st.code(
        f"# {texts('no_models_sample')}\nbash quickstart.sh\nstreamlit run fast_inference.py -- --out_dir out/quickstart\n\n"
        f"# {texts('no_models_own')}\npython 1-pretrain.py\npython 3-full_sft.py",
        language="bash",
    )


def show_examples(writer: ChatModel, texts: Texts) -> str | None:
    """The page before the first question; the example that was clicked."""
    kind = "base" if writer.continues else "chat"
    st.html(empty_html(texts(f"hello_{kind}"), texts(f"hello_{kind}_more", name=writer.name)))
    with st.container(horizontal=True, horizontal_alignment="center"):
        for i, example in enumerate(texts(f"example_{kind}").split("|")):
            if st.button(example, key=f"example_{i}"):
                return example
    return None


def show_question(exchange: Exchange) -> None:
    if not exchange.continues:  # otherwise it is the beginning of what the model wrote
        with st.chat_message("user", avatar=":material/person:"):
            st.html(text_html(visible(exchange.question)))


def show_answer(exchange: Exchange, texts: Texts) -> tuple[DeltaGenerator, DeltaGenerator] | None:
    """The answer as it is now, or why there is none; the places of its text and facts."""
    answer = exchange.answer
    if answer is None:
        st.error(literal(texts("not_answered", reason=visible(exchange.problem))), icon=":material/error:")
        return None
    note = left_out_note(answer, texts)
    if note:
        st.html(facts_html(note))
    places = st.empty(), st.empty()
    draw(exchange, places, texts)
    return places


def draw(exchange: Exchange, places: tuple[DeltaGenerator, DeltaGenerator], texts: Texts) -> None:
    """The answer as it is now."""
    text, facts = places
    answer, running = exchange.answer, exchange.answer.finish is None
    beginning = visible(exchange.question) if exchange.continues else ""
    shown = visible(answer.text) or ("" if running or beginning else texts("no_text"))
    text.html(text_html(shown, beginning=beginning, writing=running))
    facts.html(facts_html(answer_facts(answer, exchange.writer, texts) if answer.tokens else texts("thinking")))


def write(exchange: Exchange, places: tuple[DeltaGenerator, DeltaGenerator], texts: Texts) -> None:
    """Go on with an answer and draw it as it grows. Each drawing lets Streamlit end this run, at a click on Stop, say."""
    answer: Answer = exchange.answer
    drawn = time.monotonic()
    while answer.advance():
        # Long texts are drawn less often: each drawing sends all of it.
        if time.monotonic() - drawn >= DRAW_SECONDS + len(answer.text) / 400_000:
            draw(exchange, places, texts)
            drawn = time.monotonic()


def copy_button(text: str, key: str, texts: Texts) -> None:
    """A button that puts `text` into the clipboard."""
    mount = st.components.v2.component("minimind_copy", html=COPY_HTML, css=COPY_CSS, js=COPY_JS)
    data = {"text": text, "label": texts("copy"), "done": texts("copied"), "failed": texts("not_copied")}
    mount(key=key, data=data, width="content")


def main() -> None:
    st.set_page_config(page_title="MiniMind", page_icon="💬")
    st.html(STYLE)
    try:
        args = parse_args()
    except UserError as error:
        st.error(literal(Texts(language_of(st.context.locale))("wrong_flags", reason=str(error))))
        st.stop()
    conversation: Conversation = st.session_state.setdefault("conversation", Conversation())

    with st.sidebar:
        texts = choose_language(args)
        entry = choose_model(args, texts)
        facts = st.container()
    st.html(title_html("MiniMind", texts("subtitle")))
    if entry is None:
        show_nothing_there(args, texts)
        return
    loaded = loaded_model(entry, args, texts)
    with facts:
        show_facts(entry, loaded, texts)
    writer = question = None
    if loaded is not None:
        name = entry.path.name
        writer = ChatModel(
            loaded.checkpoint.model,
            loaded.tokenizer,
            loaded.context,
            name,
            entry.continues,
            decoding_thread(),
            loaded.backend,
        )
        with st.sidebar:
            sampling, history_turns, system = choose_settings(args, texts, writer.context, not writer.continues)
        settings = dict(sampling=sampling, history_turns=history_turns, system=system)
    # Always in the same place, so that a question half typed outlives the button's coming and going.
    with st.bottom, st.container(horizontal_alignment="center"):
        if conversation.running is not None and st.button(texts("stop"), key="stop", icon=":material/stop_circle:"):
            conversation.stop()
            st.rerun()
    hint = texts("continue" if entry.continues else "ask")
    question = st.chat_input(hint, key="question", disabled=writer is None)
    if writer is not None and not conversation.exchanges and not question:
        question = show_examples(writer, texts)
    if question:
        conversation.ask(question, writer, **settings)
        st.rerun()

    for i, exchange in enumerate(conversation.exchanges):
        last = i == len(conversation.exchanges) - 1
        show_question(exchange)
        with st.chat_message("assistant", avatar=":material/neurology:"):
            places = show_answer(exchange, texts)
            if last and conversation.running is not None:
                st.empty()  # where the buttons were: what a run does not replace stays until its end
                write(exchange, places, texts)
                st.rerun()
            with st.container(horizontal=True, gap="small", key=f"actions_{i}"):
                if exchange.answer is not None and exchange.answer.text:
                    beginning = exchange.question if exchange.continues else ""
                    copy_button(visible(beginning + exchange.answer.text), f"copy_{i}", texts)
                again, clear = st.empty(), st.empty()
                if last and writer is not None and small_button(again, "again", ":material/refresh:", texts):
                    conversation.again(writer, **settings)
                    st.rerun()
                if last and small_button(clear, "clear", ":material/delete:", texts):
                    conversation.clear()
                    st.rerun()


def small_button(place: DeltaGenerator, key: str, icon: str, texts: Texts) -> bool:
    return place.button(texts(key), key=key, icon=icon, type="tertiary")


def start_server() -> None:
    """What `streamlit run` does, for those who write `python fast_inference.py`; wrong flags end it before that."""
    from streamlit.web import cli

    parse_args()
    sys.argv = ["streamlit", "run", str(Path(__file__).resolve()), "--", *sys.argv[1:]]
    cli.main()


if __name__ == "__main__":
    if st.runtime.exists():
        main()
    else:
        run_script(start_server)
