"""The two files of a checkpoint: a `.pth` with the tensors, and the JSON beside it that describes them.

    save_checkpoint("out/pretrain_512.pth", model, info={"stage": "pretrain", "step": 1000})

A `.pth` is a plain state dict under the published names. `<same name>.json` beside it holds the configuration and how
the weights were made. To load them, published files without a JSON included, see `model.weights`.

**Which JSON belongs to which weights.** Each file is replaced atomically, but the two cannot be replaced at once. So
the JSON carries a fingerprint of its `.pth`, and it is written in this order: the new weights under a temporary name;
the JSON of the new weights, which still holds the old JSON as `previous`; the rename of the weights; the JSON without
`previous`. A process killed anywhere leaves weights whose description is in the JSON. Weights that fit neither were
put there by another program, and are refused rather than read with the wrong number of heads.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.serialization import skip_data

from common.cli import as_word
from common.errors import UserError, first_line
from common.files import atomic_write, short_hash, write_json
from model.LMConfig import FIELD_TYPES, LMConfig, architecture_differences
from model.model import Transformer, model_class

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"  # one tensor under two names, if they are tied
_DAMAGE = (RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError, IndexError, zipfile.BadZipFile)


@dataclass
class Checkpoint:
    """Weights read from `path`. `info` is the JSON beside them ({} if none), `notes` are remarks for the user.

    `fingerprint` is 16 hex digits that change with the content of the file.
    """

    model: Transformer
    config: LMConfig
    info: dict[str, Any]
    path: Path
    fingerprint: str
    notes: list[str] = field(default_factory=list)

    @property
    def vision_encoder(self) -> Path | None:
        """Return the folder of the image model with which these weights were trained, as their description has it."""
        folder = self.info.get("options", {}).get("vision_encoder")
        return Path(folder) if folder else None


# ---- writing


def save_checkpoint(
    path: Path | str,
    model: Transformer,
    *,
    dtype: torch.dtype = torch.float32,
    info: dict[str, Any],
    overwrite: bool = False,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write the weights of `model` and the JSON beside them. Killed at any moment, the old or the new pair remains.

    Args:
        path: the `.pth` file; its folder is created.
        model: a bare Transformer (compiled or not), on any device.
        dtype: of the file: float32, bfloat16 or float16.
        info: what the JSON records beside the configuration: stage, step, tokens, loss, tokenizer_hash, ...
        overwrite: replace a checkpoint of another architecture.
        tensors: the (name, tensor) pairs to write, where those in `model` are sharded; they are taken one at a time.

    Raises:
        UserError: non-finite weights (by name), weights that are not a MiniMind's, or see `check_can_write`.
        OSError: a full disk, a folder without permission; the previous checkpoint is untouched.
    """
    path = Path(path)
    config = model.config
    check_can_write(path, config, overwrite)
    previous = _previous_description(path)
    ours = {"config": config.own_fields(), "dtype": dtype_name(dtype)}
    new = ours | {key: value for key, value in info.items() if key not in ("fingerprint", "previous")} | ours
    json.dumps(new, allow_nan=False)  # fails here, before anything is written, if it cannot be JSON
    skeleton = {name: torch.empty(shape, dtype=dtype) for name, shape in _expected_shapes(config).items()}
    if config.tie_word_embeddings:
        skeleton[OUTPUT] = skeleton[EMBEDDING]
    pairs = _cast(_tensors_of(model, path) if tensors is None else tensors, dtype, path)
    try:
        with atomic_write(path, "w+b") as file:
            write_tensors(file, skeleton, pairs)
            new["fingerprint"] = fingerprint_of(file)
            write_json(path.with_suffix(".json"), new | previous)
        if previous:
            write_json(path.with_suffix(".json"), new)
    except (OSError, RuntimeError) as error:
        # torch's zip writer hides the reason (no space left) behind an error of its own.
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, OSError) and reason.errno is not None:
            raise OSError(reason.errno, reason.strerror, str(path)) from error
        raise


def check_can_write(path: Path | str, config: LMConfig, overwrite: bool = False) -> None:
    """Raise UserError if `path` is a folder, or holds weights of another architecture than `config` without `overwrite`.

    A run calls this at its start, not only at its first save.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, but weights are written into a file: rename the folder")
    if overwrite or not path.exists():
        return
    advice = "choose another folder, or overwrite=True to replace it"
    try:
        info = read_description(path)
    except UserError as error:
        raise UserError(f"{path} exists and is not a checkpoint that can be read ({error}); {advice}") from error
    if not info:
        raise UserError(f"{path} exists, and no description is beside it ({path.with_suffix('.json').name}); {advice}")
    differences = architecture_differences(config, config_from_json(info, path.with_suffix(".json")))
    if differences:
        raise UserError(
            f"{path} holds a model of another architecture (this one != that one: {', '.join(differences)}); {advice}"
        )


def state_to_save(model: Transformer, dtype: torch.dtype, path: Path | str) -> dict[str, Tensor]:
    """Return the weights in `dtype` on the CPU, the tied pair once, under the embedding's name.

    Raises UserError for weights that could not be read again; `path` is for its message.
    """
    return dict(_cast(_tensors_of(model, path), dtype, path))


def _tensors_of(model: Transformer, path: Path | str) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of `model` by their names, the tied pair once."""
    state = {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in model.state_dict().items()}
    check_names_and_shapes(state, model.config, path)
    if model.config.tie_word_embeddings and not torch.equal(state[EMBEDDING], state.pop(OUTPUT)):
        raise UserError(f"{path} was not written: {OUTPUT} is no longer tied to {EMBEDDING}")
    yield from state.items()


def _cast(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, path: Path | str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in `dtype` on the CPU. Raises UserError for one that is not finite, before or after the cast."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"{path}: weights are saved as float32, bfloat16 or float16, not {dtype_name(dtype)}")
    for name, tensor in tensors:
        if not tensor.isfinite().all():  # the training went wrong
            raise UserError(f"{path} was not written: these weights are not finite: {name}")
        tensor = tensor.to("cpu", dtype)
        if not tensor.isfinite().all():  # float16 ends at 65,504
            raise UserError(
                f"{path} was not written: too large for {dtype_name(dtype)}: {name}; save as float32 or bfloat16"
            )
        yield name, tensor


def _previous_description(path: Path) -> dict:
    """Return {"previous": the description of the weights now in `path`}, or {} if there are none."""
    if not path.is_file():
        return {}
    try:
        return {"previous": read_description(path) | {"fingerprint": fingerprint_of(path)}}
    except UserError:  # it cannot be read anyway, and the user wants it replaced
        return {}


def build_model(state: dict[str, Tensor], config: LMConfig, path: Path | str) -> Transformer:
    """Return a model of exactly these tensors, a tied output taken from the embedding, in evaluation mode.

    Raises UserError for weights that do not fit; `path` is for its message.
    """
    if config.tie_word_embeddings and EMBEDDING in state:
        state = state | {OUTPUT: state[EMBEDDING]}
    check_names_and_shapes(state, config, path)
    with torch.device("meta"):  # no memory, and no random numbers that are thrown away
        model = model_class(config)(config)
    model.load_state_dict(state, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model.eval()


def _expected_shapes(config: LMConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in model_class(config)(config).state_dict().items()}


def check_names_and_shapes(state: dict[str, Tensor], config: LMConfig, path: Path | str) -> None:
    """Raise UserError, naming the weights, unless exactly those of `config` are there in its shapes."""
    expected = _expected_shapes(config)
    errors = []
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if missing:
        errors.append(f"missing: {list_names(missing)}")
    if unexpected:
        errors.append(f"unexpected: {list_names(unexpected)}")
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if misshapen:
        errors.append(f"other shapes: {list_names(misshapen)}")
    if errors:
        raise UserError(f"{path}: the weights do not fit their architecture; {'; '.join(errors)}")


# ---- the tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a `.pth` file; the tensors are mapped from the file. Raises UserError for anything else."""
    if not path.exists():
        files = sorted(file.name for file in path.parent.glob("*.pth"))
        there = f"in {path.parent} there are: {', '.join(files)}" if files else f"no .pth file is in {path.parent}"
        raise UserError(f"no checkpoint {path}; {there}")
    if not path.is_file():
        hint = ""
        if (path / "adapter_config.json").exists():
            hint = "; 4-lora_sft.py --merge makes one of an adapter and its base"
        elif (path / "config.json").exists():
            hint = f"; make one of it: python export_model.py --format pth --weights {as_word(path)}"
        raise UserError(f"{path} is a folder; name a .pth file{hint}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a state dict of tensors: it is another kind of file, or holds objects, which are never "
            "loaded because they can run code"
        ) from error
    except (*_DAMAGE, OSError) as error:
        # torch explains in a whole paragraph, and recommends a setting that runs code from the file.
        reason = first_line(error).partition(". ")[0]
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


# ---- the description


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
    return short_hash(entries)


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


def config_from_json(info: dict, file: Path) -> LMConfig:
    """Return the configuration in the JSON `file`. Raises UserError if it cannot be used."""
    fields, types = info["config"], FIELD_TYPES
    unknown = sorted(set(fields) - set(types))
    if unknown:
        raise UserError(f'{file}: unknown fields in "config": {list_names(unknown)}; written by another version?')
    fractions = [name for name, value in fields.items() if types[name] == "int" and type(value) is not int]
    if fractions:
        raise UserError(f'{file}: "config" cannot be used: not a whole number: {list_names(fractions)}')
    try:
        return LMConfig(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f'{file}: "config" cannot be used: {error}') from error


def list_names(names: list[str], limit: int = 4) -> str:
    """Return the first names as one text, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
