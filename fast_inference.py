"""Chat with the models in out/ on a web page, on this machine, and look inside them; base models continue your text.

    streamlit run fast_inference.py
    streamlit run fast_inference.py -- --out_dir out/quickstart --temperature 0
    python fast_inference.py --weights out/full_sft_512.pth         # the same as streamlit run

Streamlit's own flags come before the two dashes: streamlit run fast_inference.py --server.port 8502 -- --out_dir out
Streamlit runs `page` from top to bottom at every click. The conversation is kept in `st.session_state`, one for each
browser tab, and saved in the folder chats/ of --out_dir; an answer that is being written is kept there too, and each run
continues it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from common.cli import Parser, flag, parse_options
from common.errors import UserError, name_flags, run_script
from inference.model_finder import read_entry
from inference.options import ChatOptions, ModelOptions, SamplingParams, model_options, sampling_options
from serving.web.texts import LANGUAGES, Texts


@dataclass
class Options(ChatOptions):
    """Initial state of the page; the sliders change most of it."""

    language: str = flag("auto", "of the page; auto: the browser's", choices=["auto", *LANGUAGES])
    model: ModelOptions = model_options()
    sampling: SamplingParams = sampling_options(temperature=0.7, top_p=0.9)

    def validate(self) -> list[str]:
        weights = self.model.weights
        if weights is not None and read_entry(weights) is None:
            reason = "is not a .pth file, adapter or exported folder" if weights.exists() else "does not exist"
            return [f"--weights {weights} {reason}"]
        return []


class PageParser(Parser):
    """Wrong flags become one line on the page; argparse would end the process."""

    def error(self, message: str | list[str]) -> NoReturn:
        raise UserError(message if isinstance(message, str) else "; ".join(message))

    def print_help(self, file: Any = None) -> None:
        import streamlit as st

        st.code(self.format_help(), language=None)
        st.stop()


def page() -> None:
    import streamlit as st  # `python fast_inference.py --help` needs neither Streamlit nor torch

    from evaluation.tools import chat_tools
    from serving.web import widgets
    from serving.web.inside import menu, shared
    from serving.web.page import STYLE, literal
    from serving.web.texts import language_of

    st.set_page_config(page_title="MiniMind", page_icon="💬")
    st.html(STYLE)
    try:
        options = parse_options(Options, __doc__, parser_class=PageParser)
        tools = chat_tools(options.tools or [])
    except UserError as error:
        st.error(literal(Texts(language_of(st.context.locale))("wrong_flags", reason=name_flags(str(error)))))
        st.stop()
    with st.sidebar:
        texts = widgets.choose_language(options.language)
    menu.choose_page(lambda: chat(options, tools, texts), shared.View(options.model, options.sampling, texts)).run()


def chat(options: Options, tools: dict[str, Any], texts: Texts) -> None:
    """Draw the page of the chat."""
    import streamlit as st

    from serving.saved_chats import ChatFolder
    from serving.web import chat_menu, widgets
    from serving.web.page import title_html

    folder = ChatFolder(options.model.out_dir / "chats")
    with st.sidebar:
        conversation = chat_menu.choose_chat(folder, texts)
        entry = widgets.choose_model(options.model, texts)
        facts = st.container()
    st.html(title_html("MiniMind", texts("subtitle")))
    if entry is None:
        widgets.show_no_models(options.model.out_dir, texts)
        return
    model = widgets.load_model(entry, options.model, texts)
    with facts:
        widgets.show_model_facts(entry, model, texts)
    settings = {}
    with st.sidebar:
        if model is not None:
            settings = widgets.choose_settings(options.sampling, options, tools, model, texts)
        st.toggle(texts("markdown"), key="markdown", persist_state="session", help=texts("markdown_help"))
    # Always at the same position: a half-written question would be lost if the button moved its input field.
    with st.bottom, st.container(horizontal_alignment="center"):
        if conversation.running and st.button(texts("stop"), key="stop", icon=":material/stop_circle:", shortcut="Esc"):
            chat_menu.stop(folder, conversation)
            st.rerun()
    question, images = widgets.ask_question(entry, model, texts)
    widgets.announce(conversation, texts)
    if model is not None and not conversation.exchanges and not question:
        question = widgets.show_examples(model, texts)
    if model is not None and question:
        conversation.ask(question, model, **settings, images=images)
        chat_menu.save(folder, conversation)
        st.rerun()

    for i, exchange in enumerate(conversation.exchanges):
        last = i == len(conversation.exchanges) - 1
        widgets.show_question(exchange, texts)
        with st.chat_message("assistant", avatar=":material/neurology:"):
            placeholders = widgets.show_answer(exchange, texts)
            if placeholders is not None and exchange.running:
                st.empty()  # where the buttons were: what a run does not replace stays until its end
                try:
                    widgets.write([(exchange, placeholders)], texts)
                finally:  # a click, or a page that is closed, ends this run here
                    chat_menu.save(folder, conversation)
                st.rerun()
            with st.container(horizontal=True, gap="small", key=f"actions_{i}"):
                widgets.copy_button(exchange, f"copy_{i}", texts)
                if model is not None and (edited := widgets.edit_question(exchange, f"{conversation.id}_{i}", texts)):
                    chat_menu.stop(folder, conversation)
                    branch = st.session_state.conversation = conversation.branch(i)
                    branch.ask(edited, model, **settings, images=exchange.images)
                    chat_menu.save(folder, branch)
                    st.rerun()
                regenerate, new_chat = st.empty(), st.empty()
                if last and model is not None and widgets.small_button(
                    regenerate, "regenerate", ":material/refresh:", texts
                ):  # fmt: skip
                    conversation.regenerate(model, **settings)
                    chat_menu.save(folder, conversation)
                    st.rerun()
                if last and widgets.small_button(new_chat, "new_chat", ":material/add_comment:", texts):
                    chat_menu.open_chat(folder, None)
                    st.rerun()


def main() -> None:
    """Do what `streamlit run` does; wrong flags and --help end the process before that."""
    parse_options(Options, __doc__)

    from streamlit.web import cli

    sys.argv = ["streamlit", "run", str(Path(__file__).resolve()), "--", *sys.argv[1:]]
    cli.main()


if __name__ == "__main__":
    runtime = sys.modules.get("streamlit.runtime")
    if runtime is not None and runtime.exists():
        page()
    else:
        run_script(main)
