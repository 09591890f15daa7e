"""The texts of the web page, in every language it has: `locales/LANGUAGE.json`, and the same in `inside/`.

texts = Texts("ja")
texts("tokens", made=12, prompt=40)
"""

from __future__ import annotations

import json
from pathlib import Path

LANGUAGES = {"zh": "中文", "en": "English", "ja": "日本語"}
FOLDERS = [Path(__file__).parent / "locales", Path(__file__).parent / "inside" / "locales"]
TEXTS: dict[str, dict[str, str]] = {
    language: {
        key: text
        for folder in FOLDERS
        for key, text in json.loads((folder / f"{language}.json").read_text(encoding="utf-8")).items()
    }
    for language in LANGUAGES
}


class Texts:
    """The texts of one language, by key."""

    def __init__(self, language: str) -> None:
        self.language = language

    def __call__(self, key: str, **values: object) -> str:
        return TEXTS[self.language][key].format(**values)


def language_of(locale: str | None) -> str:
    """Return the language of the page for a browser's language tag such as zh-CN; English if it has no other."""
    first = (locale or "").lower().split("-")[0].split("_")[0]
    return first if first in LANGUAGES else "en"
