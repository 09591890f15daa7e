"""The menu of saved chats in the sidebar. `st.session_state.conversation` is the chat that the page shows."""

from __future__ import annotations

import streamlit as st

from common.errors import UserError
from common.text import visible
from serving.chat_model import Conversation
from serving.saved_chats import ChatFolder, title_of, to_jsonl, to_markdown
from serving.web.page import literal
from serving.web.texts import Texts


def open_chat(folder: ChatFolder, id: str | None) -> None:
    """Show a saved chat, with its system message and its model, instead of the present one; None: a new one."""
    if "conversation" in st.session_state:
        stop(folder, st.session_state.conversation)
    try:
        st.session_state.conversation = folder.load(id) if id else Conversation()
    except UserError as error:
        st.session_state.problem = str(error)
        st.session_state.setdefault("conversation", Conversation())
    else:
        if id:
            chat: Conversation = st.session_state.conversation
            st.session_state.setdefault("kept", {})["system"] = chat.system
            st.session_state.wanted_model = chat.exchanges[-1].model_name if chat.exchanges else None


def stop(folder: ChatFolder, conversation: Conversation) -> None:
    """Stop the answer that is being written, if there is one, and save what there is of it."""
    if conversation.running:
        conversation.stop()
        save(folder, conversation)


def save(folder: ChatFolder, conversation: Conversation) -> None:
    """Save a chat; if that fails, the next run of the page says so."""
    try:
        folder.save(conversation)
        st.session_state.problem = ""
    except (OSError, ValueError) as error:
        st.session_state.problem = f"{folder.folder}: {error}"


def current_chat(folder: ChatFolder) -> Conversation:
    """Return the chat that the page shows; read it again if another tab has changed it, and nothing here is unsaved."""
    shown: Conversation = st.session_state.conversation
    if folder.changed(shown) and not shown.running and not st.session_state.get("problem"):
        open_chat(folder, shown.id)
    return st.session_state.conversation


def choose_chat(folder: ChatFolder, texts: Texts) -> Conversation:
    """Show the choice of chats, what can be done with the chosen one, and what is wrong; return that one.

    Its id is part of the page's address, so that it is still there when the browser loads the page again.
    """

    def choose() -> None:
        if st.session_state.chat:  # the Esc key empties the choice: the chat stays
            open_chat(folder, st.session_state.chat)

    titles, damaged = folder.titles()
    if "conversation" not in st.session_state:
        asked = st.query_params.get("chat")
        open_chat(folder, asked if asked in titles else None)
    conversation = current_chat(folder)
    saved = st.session_state.chat = conversation.id if conversation.id in titles else None
    st.selectbox(
        texts("chat"), list(titles), key="chat", format_func=lambda id: titles.get(id, id), placeholder=texts("new_chat"),
        on_change=choose, help=literal(texts("chat_help", folder=folder.folder)),
        index=None,
    )  # fmt: skip
    if saved:
        if st.query_params.get("chat") != saved:
            st.query_params["chat"] = saved
        with st.popover(texts("this_chat"), width="stretch", icon=":material/more_horiz:"):
            manage_chat(folder, conversation, texts)
    elif "chat" in st.query_params:
        del st.query_params["chat"]
    for file in damaged:
        st.warning(literal(texts("damaged_chat", reason=visible(file))))
    if problem := st.session_state.get("problem"):
        st.error(literal(texts("chat_problem", reason=visible(problem))))
    return conversation


def manage_chat(folder: ChatFolder, conversation: Conversation, texts: Texts) -> None:
    """Show what renames, exports and deletes a chat."""
    id = conversation.id

    def rename() -> None:
        chat = current_chat(folder)
        chat.title = st.session_state[f"title_{id}"]
        save(folder, chat)

    def delete() -> None:
        conversation.stop()
        try:
            folder.delete(conversation.id)
        except OSError as error:
            st.session_state.problem = f"{folder.folder}: {error}"
        else:
            st.session_state.conversation = Conversation()

    st.text_input(texts("chat_title"), title_of(conversation), key=f"title_{id}", on_change=rename)
    files = {"md": lambda: to_markdown(conversation, texts("you")), "jsonl": lambda: to_jsonl(conversation)}
    for kind, make in files.items():
        st.download_button(
            texts(f"export_{kind}"), make, f"{id}.{kind}", key=f"export_{kind}", icon=":material/download:", width="stretch",
            on_click="ignore", disabled=kind == "jsonl" and not conversation.turns(),
        )  # fmt: skip
    st.button(texts("delete_chat"), key="delete_chat", icon=":material/delete:", width="stretch", on_click=delete)
