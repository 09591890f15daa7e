"""The parts of the web page, from top to bottom: pickers, settings, conversation. `fast_inference.py` puts them together.

Streamlit runs the page again at every click; what has to last is in `st.session_state`, one for each browser tab.
"""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import streamlit as st
import torch
from streamlit.delta_generator import DeltaGenerator

from common.errors import UserError, name_flags
from common.text import visible
from data_pipeline.images import FORMATS, check_image, data_url
from inference.model_finder import EXPORT, Entry, default_model, list_models, read_entry
from inference.model_loader import TextGenerator, load_text_generator
from inference.options import ChatOptions, ModelOptions, SamplingParams
from model.chat_style import chat_style
from model.model import parameter_counts
from serving.chat_model import STOPPED, ChatModel, Conversation, Exchange
from serving.web.page import (
    answer_facts,
    empty_html,
    facts_html,
    left_out_note,
    literal,
    shown_answer,
    size_text,
    steps_html,
    text_html,
)
from serving.web.texts import LANGUAGES, Texts, language_of

RELOAD_SECONDS = 3  # between two looks into the folder of models
DRAW_SECONDS = 0.05  # between two drawings of a growing answer
MODELS_KEPT = 4  # in memory, the last used
# Those that have a name in every language:
STAGES = ("pretrain", "full_sft", "rl", "rlvr", "distill", "lora", "pretrain_vlm", "sft_vlm")
# Range and step of the sliders; a value from the command line may lie outside.
SLIDERS: dict[str, tuple[float, float, float]] = {
    "temperature": (0.0, 2.0, 0.05),
    "top_p": (0.05, 1.0, 0.05),
    "top_k": (0, 200, 1),
    "repetition_penalty": (1.0, 2.0, 0.01),
}
IMAGE_TYPES = [ending for endings in FORMATS.values() for ending in endings]
IMAGE_WIDTH = 240  # pixels, of a picture on the page
FOLDER = Path(__file__).parent
Placeholders = tuple[DeltaGenerator, DeltaGenerator]  # of the text of an answer and of the facts below it


# ---- models


def available_models(options: ModelOptions) -> list[Entry]:
    """Return --weights if given, then what is in --out_dir."""
    named = read_entry(options.weights) if options.weights is not None else None
    found = list_models(options.out_dir)
    if named is None:
        return found
    return [named, *(entry for entry in found if entry.path.resolve() != named.path.resolve())]


@st.cache_resource(max_entries=MODELS_KEPT, show_spinner=False)
def cached_model(path: Path, _options: ModelOptions, flags: str, stamp: tuple) -> TextGenerator:
    """Load a model, and what prepares images for it if it sees.

    Once for all sessions, and again if one of its files changed: `path`, `flags`, `stamp` are the key.

    Raises UserError or OSError if that fails.
    """
    generator = load_text_generator(path, _options)
    generator.image_processor  # noqa: B018  an error of it belongs here
    return generator


@st.cache_resource(show_spinner=False)
def decoding_thread() -> Executor:
    """Return the one thread that computes the tokens of all sessions, in turn."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoding")


def load_model(entry: Entry, options: ModelOptions, texts: Texts) -> ChatModel | None:
    """Return the model; show an error and return None if it cannot be loaded."""
    try:
        with st.spinner(literal(texts("loading", name=entry.path.name))):
            generator = cached_model(entry.path, options, repr(options), entry.stamp)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        reason = visible(name_flags(str(error))).strip().partition("\n")[0]
        st.error(literal(texts("cannot_load", name=entry.path.name, reason=reason)), icon=":material/error:")
        return None
    return ChatModel(generator, entry.path.name, entry.continues, decoding_thread())


# ---- the sidebar


def choose_language(language: str) -> Texts:
    """Show the choice of languages; at first it is `language`, or the browser's ("auto")."""
    if "language" not in st.session_state:
        st.session_state.language = language_of(st.context.locale) if language == "auto" else language
    texts = Texts(st.session_state.language)
    st.segmented_control(
        texts("language"), list(LANGUAGES), format_func=lambda code: LANGUAGES[code], key="language", required=True,
        label_visibility="collapsed", width="stretch",
    )  # fmt: skip
    return texts


def stage_text(entry: Entry, texts: Texts) -> str:
    return texts(f"stage_{entry.stage}") if entry.stage in STAGES else entry.stage or texts("stage_unknown")


def choose_model(options: ModelOptions, texts: Texts) -> Entry | None:
    """Show the choice of models; return None if there are none."""
    entries = available_models(options)
    rerun_on_change(options, entries)
    if not entries:
        return None
    by_path = {str(entry.path): entry for entry in entries}
    if st.session_state.get("model") not in by_path:
        first = entries[0] if options.weights is not None else default_model(entries)
        st.session_state.model = str(first.path)
    wanted = st.session_state.pop("wanted_model", None)  # by a chat that was just opened
    named = [path for path in by_path if Path(path).name == wanted]
    # Each time: the browser knows the choice by its label, which is another one in another language.
    st.session_state.model = named[0] if named else st.session_state.model
    path = st.selectbox(
        texts("model"), list(by_path), key="model", persist_state="session",
        help=literal(texts("model_help", folder=options.out_dir)),
        format_func=lambda path: f"{Path(path).name} · {stage_text(by_path[path], texts)}",
    )  # fmt: skip
    return by_path[path]


@st.fragment(run_every=RELOAD_SECONDS)
def rerun_on_change(options: ModelOptions, shown: list[Entry]) -> None:
    """Draw the page again when the folder of models differs from what is shown."""
    if available_models(options) != shown:
        st.rerun()


def show_model_facts(entry: Entry, model: ChatModel | None, texts: Texts) -> None:
    """Show what is known of the chosen model: stage, size, loss, parameters, context."""
    first = [stage_text(entry, texts), *([texts("exported")] if entry.kind == EXPORT else [])]
    first += [texts("on_base", base=entry.base)] if entry.base else []
    second = [texts("size", size=size_text(entry.size))]
    second += [texts("loss", loss=entry.loss)] if entry.loss is not None else []
    second += [texts("step", step=entry.step)] if entry.step is not None else []
    lines = [" · ".join(first), " · ".join(second)]
    if model is not None:
        checkpoint, context = model.generator.checkpoint, model.generator.context
        weight = checkpoint.model.get_input_embeddings().weight
        millions = parameter_counts(checkpoint.model)["total"] / 1e6
        dtype = str(weight.dtype).removeprefix("torch.")
        lines.append(f"{texts('parameters', millions=millions)} · {dtype} · {weight.device}")
        lines.append(texts("context", context=context))
        trained = checkpoint.config.max_seq_len
        lines += [texts("beyond_trained", trained=trained)] if context > trained else []
        lines += checkpoint.notes
    st.html(facts_html(*map(visible, lines)))


def kept_widget(widget: Any, label: str, key: str, start: Any, name: str = "", **settings: Any) -> Any:
    """Show a control that begins at what the user chose before, or at `start`; return its value.

    Streamlit forgets the value of a control that is not shown, and a slider cannot lie outside its range. What the user
    chose is kept beside it, and returns with a model that has the control, or a longer context.

    Args:
        key: of the control.
        name: under which the value is kept, which several controls may share; as a rule its key.
    """
    kept, name = st.session_state.setdefault("kept", {}), name or key

    def keep() -> None:
        kept[name] = st.session_state[key]

    value = kept.get(name, start)
    if widget is st.slider:
        st.session_state[key] = min(value, settings["max_value"])
    elif st.session_state.get(key) != value:  # otherwise leave alone what is being typed there
        st.session_state[key] = value
    return widget(label, key=key, on_change=keep, **settings)


def choose_settings(
    start: SamplingParams, options: ChatOptions, tools: dict[str, Any], model: ChatModel, texts: Texts
) -> dict[str, Any]:
    """Show the sliders, which begin at the given values; return the arguments of `Conversation.ask`.

    tools: its arguments where tools are switched on.
    """

    def ask(widget: Any, key: str, start_value: Any, **settings: Any) -> Any:
        return kept_widget(widget, texts(key), key, start_value, help=texts(f"{key}_help"), **settings)

    def slide(key: str, value: Any, low: float, high: float, step: float) -> Any:
        return ask(st.slider, key, value, min_value=min(low, value), max_value=max(high, value), step=step)

    with st.expander(texts("sampling"), expanded=True):
        chosen = {key: slide(key, getattr(start, key), *range_step) for key, range_step in SLIDERS.items()}
        longest = max(model.generator.context - 1, 2)
        chosen["max_new_tokens"] = slide("max_new_tokens", min(start.max_new_tokens, longest), 1, longest, 1)
        chosen["seed"] = ask(
            st.number_input, "seed", start.seed, value=None, min_value=0, max_value=2**53 - 1, step=1,
            placeholder=texts("seed_empty"),
        )  # fmt: skip
    settings: dict[str, Any] = {"sampling": dataclasses.replace(start, **chosen)}
    if not model.continues:
        with st.expander(texts("conversation"), expanded=True):
            settings["history_turns"] = slide("history_turns", options.history_turns, 0, 20, 1)
            empty = texts("system_empty")
            settings["system"] = ask(st.text_area, "system", options.system or "", placeholder=empty, height=80)
            knows_tools = bool(chat_style(model.generator.tokenizer).tags)
            if knows_tools and ask(st.toggle, "tools", options.tools is not None):
                settings |= tools
    return settings


# ---- the conversation


def show_no_models(folder: Path, texts: Texts) -> None:
    """Say that there are no models yet, and how to train one."""
    st.warning(literal(texts("no_models", folder=folder)), icon=":material/inbox:")
    st.markdown(texts("no_models_next"))
    st.code(
        f"# {texts('no_models_sample')}\nbash quickstart.sh\nstreamlit run fast_inference.py -- --out_dir out/quickstart\n\n"
        f"# {texts('no_models_own')}\npython 1-pretrain.py\npython 3-full_sft.py",
        language="bash",
    )


def show_examples(model: ChatModel, texts: Texts) -> str | None:
    """Show the page before the first question; return the example that was clicked."""
    kind = "base" if model.continues else "chat"
    st.html(empty_html(texts(f"hello_{kind}"), texts(f"hello_{kind}_more", name=model.name)))
    with st.container(horizontal=True, horizontal_alignment="center"):
        for i, example in enumerate(texts(f"example_{kind}").split("|")):
            if st.button(example, key=f"example_{i}"):
                return example
    return None


def ask_question(entry: Entry, model: ChatModel | None, texts: Texts) -> tuple[str, list[str]]:
    """Show the field for a question; return the question and its images as data URLs, or "" until it is sent.

    An image that cannot be used is named, and nothing is asked then.
    """
    sees = model is not None and model.generator.image_processor is not None
    sent: Any = st.chat_input(
        texts("continue" if entry.continues else "ask"), key="question", disabled=model is None,
        accept_file="multiple" if sees else False, file_type=IMAGE_TYPES if sees else None,
    )  # fmt: skip
    if not sent or isinstance(sent, str):
        return sent or "", []
    images = []
    for file in sent.files:
        try:
            images.append(data_url(check_image(file.getvalue(), "")))
        except UserError as error:
            st.error(literal(texts("bad_image", name=file.name, reason=visible(str(error)))), icon=":material/error:")
            return "", []
    return sent.text or (texts("about_image") if images else ""), images


def show_question(exchange: Exchange, texts: Texts) -> None:
    """Show the question of an exchange."""
    if not exchange.continues:  # otherwise it is the beginning of what the model wrote
        with st.chat_message("user", avatar=":material/person:"):
            if exchange.images:
                st.image(exchange.images, width=IMAGE_WIDTH)
            st.html(text_html(visible(exchange.question), label=texts("question")))


def show_answer(exchange: Exchange, texts: Texts) -> Placeholders | None:
    """Show the answer as it is now and return its placeholders; show the error and return None if there is no answer."""
    if exchange.error:
        st.error(literal(texts("not_answered", reason=visible(exchange.error))), icon=":material/error:")
        return None
    note = left_out_note(exchange, texts)
    if note:
        st.html(facts_html(note))
    placeholders = st.empty(), st.empty()
    draw(exchange, placeholders, texts)
    return placeholders


def draw(exchange: Exchange, placeholders: Placeholders, texts: Texts) -> None:
    """Draw an answer and the facts about it into their places."""
    text, facts = placeholders
    text.html(
        steps_html(exchange, texts)
        + text_html(
            shown_answer(exchange, texts), beginning=visible(exchange.question) if exchange.continues else "",
            writing=exchange.running, markdown=bool(exchange.text) and st.session_state.get("markdown", False),
            label=texts("answer"),
        )
    )  # fmt: skip
    reading = exchange.running and not exchange.tokens
    facts.html(facts_html(texts("reading") if reading else answer_facts(exchange, texts)))


def write(growing: list[tuple[Exchange, Placeholders]], texts: Texts) -> None:
    """Continue answers, a token of each in turn, and draw them as they grow.

    Streamlit may end this run at each drawing, for example for Stop.
    """
    drawn = time.monotonic()
    while growing := [(exchange, placeholders) for exchange, placeholders in growing if exchange.advance()]:
        # Long texts are drawn less often: each drawing sends all of it.
        if time.monotonic() - drawn >= sum(DRAW_SECONDS + len(exchange.text) / 400_000 for exchange, _ in growing):
            for exchange, placeholders in growing:
                draw(exchange, placeholders, texts)
            drawn = time.monotonic()


def component(name: str, html: str) -> Any:
    """Return a component that shows HTML, with the style and the script of that name in this folder."""
    css, js = ((FOLDER / f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return st.components.v2.component(f"minimind_{name}", html=html, css=css, js=js)


def copy_button(exchange: Exchange, key: str, texts: Texts) -> None:
    """Show a button that copies the content of the answer to the clipboard, if there is any."""
    content = exchange.answer().content
    if not content:
        return
    beginning = exchange.question if exchange.continues else ""
    mount = component("copy_button", "<button type='button'></button>")
    labels = {"label": texts("copy"), "done": texts("copied"), "failed": texts("not_copied")}
    mount(key=key, data={"text": visible(beginning + content), **labels}, width="content")


def announce(conversation: Conversation, texts: Texts) -> None:
    """Let screen readers say what happens, and put the cursor into the field for the question at first and after Stop."""
    status = ""
    if conversation.exchanges:
        last = conversation.exchanges[-1]
        status = texts("writing") if last.running else visible(last.error) or shown_answer(last, texts)
    stops = sum(exchange.finish == STOPPED for exchange in conversation.exchanges)
    mount = component("announce", "<div role='status'></div>")
    mount(key="announce", data={"language": texts.language, "status": status, "focus": f"{conversation.id} {stops}"})


def edit_question(exchange: Exchange, key: str, texts: Texts) -> str:
    """Show the button that opens the question for editing; return the new question when it is sent."""
    with st.popover(texts("edit"), icon=":material/edit:", type="tertiary", key=f"edit_{key}"):
        question = st.text_area(texts("question"), exchange.question, key=f"question_{key}")
        st.caption(texts("edit_help"))
        return question if st.button(texts("send"), key=f"send_{key}", type="primary") else ""


def small_button(placeholder: DeltaGenerator, key: str, icon: str, texts: Texts) -> bool:
    return placeholder.button(texts(key), key=key, icon=icon, type="tertiary")
