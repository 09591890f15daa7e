"""/ and /docs: what this server has, as plain pages that need nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from starlette.responses import HTMLResponse

STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
td { padding: .2em 1em .2em 0; vertical-align: top }
"""


def index_page(document: dict[str, Any], model: str, context: int) -> HTMLResponse:
    """Return the page with the model, the endpoints, and links."""
    rows = []
    for path, methods in document["paths"].items():
        shown = f"<code>{escape(path)}</code>"
        rows.append((shown if "post" in methods or "{" in path else f'<a href="{escape(path)}">{shown}</a>', *methods))
    facts = f"<p>Model <b>{escape(model)}</b>, context {context} tokens. Base URL for clients: <code>/v1</code></p>"
    links = '<p><a href="/docs">Fields of the requests</a>, <a href="/openapi.json">OpenAPI document</a></p>'
    return _page("MiniMind", facts + _table(rows) + links)


def docs_page(document: dict[str, Any]) -> HTMLResponse:
    """Return the page with the fields of every request, from the OpenAPI document."""
    schemas, parts = document["components"]["schemas"], [f"<p>{escape(document['info']['description'])}</p>"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            if "requestBody" in operation:
                name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                required = schemas[name].get("required", ())
                rows = [
                    (f"<code>{escape(field)}</code>", " or ".join(_types(schema)), "required" * (field in required),
                     escape(schema.get("description", "")))
                    for field, schema in schemas[name]["properties"].items()
                ]  # fmt: skip
                parts.append(_table(rows))
    return _page("MiniMind: API", "".join(parts))


def _types(schema: dict[str, Any]) -> Iterator[str]:
    """Yield the types that a field may have, as readers know them."""
    if options := schema.get("anyOf") or schema.get("oneOf"):
        for option in options:
            yield from _types(option)
    elif "enum" in schema or "const" in schema:
        yield from (f"<code>{escape(repr(value))}</code>" for value in schema.get("enum", [schema.get("const")]))
    elif schema.get("type") == "array":
        yield f"list of ({' or '.join(_types(schema.get('items', {})))})"
    else:
        yield schema.get("type") or schema.get("$ref", "any").rpartition("/")[2]


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(lines)}</table>"


def _page(title: str, body: str) -> HTMLResponse:
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return HTMLResponse(f"{head}<h1>{title}</h1>{body}</html>")
