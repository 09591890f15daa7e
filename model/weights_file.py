"""The two files of a checkpoint: a `.pth` with the tensors, and the JSON beside it that describes them.

Each file is replaced atomically, but the two cannot be replaced at once. So the JSON carries a fingerprint of its
`.pth`, and holds the description of the file before (`previous`) until the new weights are in place: see
`model.weights.save_checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.serialization import skip_data

from common.errors import UserError

_DAMAGE = (RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError, IndexError, zipfile.BadZipFile)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a `.pth` file; the tensors are mapped from the file. Raises UserError for anything else."""
    if not path.exists():
        files = sorted(file.name for file in path.parent.glob("*.pth"))
        there = f"in {path.parent} there are: {', '.join(files)}" if files else f"no .pth file is in {path.parent}"
        raise UserError(f"no checkpoint {path}; {there}")
    if not path.is_file():
        raise UserError(f"{path} is a folder; name a .pth file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a state dict of tensors: it is another kind of file, or holds objects, which are never "
            "loaded because they can run code"
        ) from error
    except (*_DAMAGE, OSError) as error:
        # torch explains in a whole paragraph, and recommends a setting that runs code from the file.
        reason = _first_line(error).partition(". ")[0]
        reason = "not written by torch.save" if "weights_only" in reason or isinstance(error, KeyError) else reason
        raise UserError(f"{path} is damaged or cut off ({reason}); copy it again or save it again") from error
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} is not a state dict: it holds a {type(state).__name__} without named tensors")
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(f"{path} is not a plain state dict: not a tensor: {list_names(others)}")
    return state


def write_tensors(file: IO[bytes], skeleton: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a state dict that `torch.load` reads, one tensor at a time: they need not be in memory together.

    torch.save writes the file without the tensors' bytes, which stay empty; they are put in their places afterwards,
    and their checksums into the zip directory.

    Args:
        file: open for reading and writing.
        skeleton: tensors of the right shapes and dtypes; their values are not used. Tied ones share their memory.
        tensors: (name, tensor) pairs on the CPU in any order, each once; one name of those that are tied.
    """
    with skip_data():
        torch.save(skeleton, file)
    file.flush()
    storages = list(dict.fromkeys(tensor.untyped_storage().data_ptr() for tensor in skeleton.values()))
    number = {name: storages.index(tensor.untyped_storage().data_ptr()) for name, tensor in skeleton.items()}
    with zipfile.ZipFile(file) as archive:
        entries, directory = archive.infolist(), archive.start_dir
    by_number = {int(entry.filename.rpartition("/")[2]): entry for entry in entries if "/data/" in entry.filename}
    checksums: dict[str, int] = {}
    for name, tensor in tensors:
        entry = by_number[number[name]]
        file.seek(entry.header_offset + 26)
        name_length, extra_length = struct.unpack("<2H", file.read(4))
        file.seek(entry.header_offset + 30 + name_length + extra_length)
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        if len(data) != entry.file_size:
            raise AssertionError(f"{name} has {len(data)} bytes instead of {entry.file_size}")
        file.write(data)
        checksums[entry.filename] = zlib.crc32(data)
    if missing := [name for name, at in number.items() if by_number[at].filename not in checksums]:
        raise AssertionError(f"not written: {list_names(missing)}")
    at = directory  # of the entry's record: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, section 4.3
    for entry in entries:
        if (checksum := checksums.get(entry.filename)) is not None:
            for place in (at + 16, entry.header_offset + 14):
                file.seek(place)
                file.write(struct.pack("<I", checksum))
        file.seek(at + 28)
        at += 46 + sum(struct.unpack("<3H", file.read(6)))
    file.flush()


def read_description(path: Path) -> dict[str, Any]:
    """Return the JSON that belongs to the weights now in `path`, {} if there is none.

    Raises UserError for a JSON that is damaged or describes other weights.
    """
    file = path.with_suffix(".json")
    if not path.is_file() or not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{file} is damaged ({error}); delete it, and the shapes in {path.name} are read instead"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise UserError(f'{file} has no "config"; delete it, and the shapes in {path.name} are read instead')
    previous = content.pop("previous", None)
    if "fingerprint" not in content:  # written by hand
        return content
    actual = fingerprint_of(path)
    for candidate in (content, previous):
        if isinstance(candidate, dict) and candidate.get("fingerprint") == actual:
            return candidate if "config" in candidate else {}  # the previous weights may have had no JSON
    raise UserError(
        f"{file} describes other weights than those in {path.name}; put the right one there, or delete it, and "
        f'the shapes are read instead (delete only its "fingerprint" if you are sure that the rest fits)'
    )


def fingerprint_of(file: Path | IO[bytes]) -> str:
    """Return 16 hex digits for a torch file, from the checksums in its zip directory: the weights need not be read."""
    if isinstance(file, Path) and not zipfile.is_zipfile(file):  # torch before 1.6
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    with zipfile.ZipFile(file) as archive:
        entries = [(entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist()]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def check_intact(path: Path, info: dict) -> None:
    """Compare the whole file with its checksums: torch.load does not, and a flipped bit is a wrong weight.

    Only for files written by this toolkit: others may have no checksums.
    """
    if "fingerprint" not in info:
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged ({error}); copy it again or save it again") from error
    if broken:
        raise UserError(f"{path} is damaged: wrong checksum of {broken}; copy it again or save it again")


def list_names(names: list[str], limit: int = 4) -> str:
    """Return the first names as one text, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
