"""The menu of the web page: the chat, and the pages that look inside a model."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st
from streamlit.navigation.page import StreamlitPage

from serving.web.inside import attention, compare, data, experts, logit_lens, next_token, runs, tokens
from serving.web.inside.shared import View

# Also the path of its address: http://127.0.0.1:8501/tokens
PAGES: dict[str, tuple[str, Callable[[View], None]]] = {
    "tokens": (":material/text_fields:", tokens.show),
    "next_token": (":material/bar_chart:", next_token.show),
    "attention": (":material/grid_on:", attention.show),
    "logit_lens": (":material/layers:", logit_lens.show),
    "experts": (":material/call_split:", experts.show),
    "runs": (":material/show_chart:", runs.show),
    "compare": (":material/view_column:", compare.show),
    "data": (":material/table_rows:", data.show),
}


def choose_page(chat: Callable[[], None], view: View) -> StreamlitPage:
    """Show the menu and return the chosen page; the chat is the first one."""
    texts = view.texts

    def page(name: str) -> StreamlitPage:
        icon, show = PAGES[name]
        return st.Page(lambda: show(view), title=texts(f"{name}_page"), icon=icon, url_path=name)

    first = st.Page(chat, title=texts("chat_page"), icon=":material/chat:", url_path="chat", default=True)
    sections = {"": [first], texts("inside"): [page(name) for name in PAGES]}
    return st.navigation(sections, position="top")
