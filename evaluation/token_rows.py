"""Look into tokenised data: the data sets in a cache, and the rows that training makes of their documents.

for info in list_datasets(Path("out/cache")):
    row = row_tokens(first_rows(info["folder"], seq_len=512), 0)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from data_pipeline.datasets import PackedRows
from data_pipeline.tokenize import open_dataset

MOST_DOCUMENTS = 20_000  # that are packed to look at them: of large data the first ones show enough


def list_datasets(*cache_dirs: Path) -> list[dict[str, Any]]:
    """Return the `info.json` of each data set in these folders, with its `folder`, the newest first."""
    found = []
    for path in {path.resolve() for folder in cache_dirs for path in folder.glob("*/info.json")}:
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
            written = path.stat().st_mtime
        except (OSError, ValueError):
            continue
        if isinstance(info, dict) and {"kind", "sources", "documents", "tokens"} <= info.keys():
            found.append((written, info | {"folder": path.parent}))
    return [info for _, info in sorted(found, key=lambda pair: (-pair[0], str(pair[1]["folder"])))]


def first_rows(folder: Path, seq_len: int) -> PackedRows:
    """Return the rows into which training would pack the first documents of a data set.

    Training packs all documents except those for validation, so its rows hold other neighbours; the rules are the same.

    Raises UserError if the data set is damaged.
    """
    dataset = open_dataset(folder)
    if dataset is None:
        raise UserError(f"{folder} is damaged, or of an earlier version: the next training run builds it again")
    return PackedRows(dataset, np.arange(min(len(dataset), MOST_DOCUMENTS)), seq_len, seed=1337)


@dataclass(frozen=True)
class RowTokens:
    """The tokens of one row, without the padding at its end.

    ids: (tokens,); document: (tokens,) 0 for the first document in the row, 1 for the second, ...; trained: (tokens,) bool,
    the tokens that the loss counts; n_padding: how many tokens of padding follow.
    """

    ids: np.ndarray
    document: np.ndarray
    trained: np.ndarray
    n_padding: int


def row_tokens(rows: PackedRows, row: int) -> RowTokens:
    """Return one row as the model would get it."""
    batch = rows.batch([row])
    used = batch.n_tokens
    document = np.cumsum(batch.inputs["position_ids"][0].numpy() == 0) - 1
    ids, labels = batch.inputs["input_ids"][0].numpy(), batch.inputs["labels"][0].numpy()
    return RowTokens(ids[:used], document[:used], labels[:used] != -100, rows.packing.seq_len - used)
