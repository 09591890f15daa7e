"""Saved chats: one JSON file each, in out/chats/. Their names are generated, never the text of a user.

folder = ChatFolder(Path("out/chats"))
folder.save(conversation)
titles, damaged = folder.titles()
conversation = folder.load(next(iter(titles)))
"""

from __future__ import annotations

import functools
import itertools
import json
import threading
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from common.errors import UserError
from common.files import atomic_write, file_stamp
from common.text import one_line, visible
from inference.terminal import training_row
from serving.chat_model import Conversation, new_id

TITLE_CHARACTERS = 50
_saving = threading.Lock()
_adapter = TypeAdapter(Conversation)


@dataclass(frozen=True)
class ChatFolder:
    """The chats in a folder. Every page that is open on it sees the same ones."""

    folder: Path

    def path(self, id: str) -> Path:
        return self.folder / f"{id}.json"

    def titles(self) -> tuple[dict[str, str], list[str]]:
        """Return the titles of all chats by their ids, the newest first, and which files are damaged, and how.

        No two titles are the same, because a list is chosen from by them: one that a newer chat has gets a number.
        """
        stamped = ((path, stamp) for path in self.folder.glob("*.json") if (stamp := file_stamp(path)) is not None)
        titles: dict[str, str] = {}
        damaged: list[str] = []
        for path, stamp in sorted(stamped, key=lambda found: (-found[1][0], found[0].name)):
            title, problem = _describe(path, stamp)
            if problem:
                damaged.append(problem)
            else:
                numbered = (f"{title} ({n})" for n in itertools.count(2))
                taken = set(titles.values())
                titles[path.stem] = next(one for one in itertools.chain([title], numbered) if one not in taken)
        return titles, damaged

    def load(self, id: str) -> Conversation:
        """Return a saved chat. Raises UserError if its file is damaged or gone."""
        path = self.path(id)
        conversation = _read(path)
        conversation.id, conversation.stamp = id, file_stamp(path)
        return conversation

    def save(self, conversation: Conversation) -> None:
        """Write a chat. If another page has changed its file meanwhile, this one becomes a chat of its own.

        Raises OSError if that fails.
        """
        with _saving:  # a page that is closed and one that is opened may do it at the same time
            if self.changed(conversation):
                conversation.id = new_id()
            path = self.path(conversation.id)
            with atomic_write(path, "wb") as file:
                file.write(_adapter.dump_json(conversation, exclude={"id", "stamp"}, indent=2))
            conversation.stamp = file_stamp(path)

    def changed(self, conversation: Conversation) -> bool:
        """Return whether another page has written this chat since it was read or written here."""
        return file_stamp(self.path(conversation.id)) not in (None, conversation.stamp)

    def delete(self, id: str) -> None:
        self.path(id).unlink(missing_ok=True)


def title_of(conversation: Conversation) -> str:
    """Return the title that the user gave, or else the beginning of the first question."""
    first = conversation.exchanges[0].question if conversation.exchanges else ""
    return visible(one_line(conversation.title.strip() or first[: 4 * TITLE_CHARACTERS], TITLE_CHARACTERS)) or "…"


def to_markdown(conversation: Conversation, user: str) -> str:
    """Return a chat as a Markdown file; `user` stands above the questions, and the name of the model above its answers."""
    parts = [f"# {title_of(conversation)}"]
    for exchange in conversation.exchanges:
        if exchange.continues:
            parts += [f"## {exchange.model_name}", exchange.question + exchange.text]
        else:
            shown = [f"![]({url})" for url in exchange.images]
            answer = exchange.answer().content or exchange.text or exchange.error
            parts += [f"## {user}", *shown, exchange.question, f"## {exchange.model_name}", answer]
    return "\n\n".join(parts) + "\n"


def to_jsonl(conversation: Conversation) -> str:
    """Return a chat as a line that training reads; "" if nothing was answered."""
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    turns, images = conversation.turns(places=True), conversation.images()
    tools = next((one.tools for one in reversed(conversation.answered()) if one.called), [])
    return json.dumps(training_row(system, turns, tools, images), ensure_ascii=False) + "\n" if turns else ""


@functools.lru_cache(maxsize=10_000)
def _describe(path: Path, stamp: tuple[int, int]) -> tuple[str, str]:
    """Return the title of a chat, or what is wrong with its file. `stamp`: it is read again only if it has changed."""
    try:
        return title_of(_read(path)), ""
    except UserError as error:
        return "", str(error)


def _read(path: Path) -> Conversation:
    try:
        return _adapter.validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError:  # no JSON, or other fields
        raise UserError(f"{path} is not a saved chat, or is damaged: delete or repair it") from None
