"""Download the published data sets of MiniMind from Hugging Face or ModelScope: `python data_process.py download`.

    download(["sft", "ceval"], Path("dataset"))
    download(["sft-mini"], Path("dataset"), "modelscope")

A file is loaded into a hidden folder, where an interrupted download continues, and gets its name when its hash is right:
what has a name is complete. HF_ENDPOINT or MODELSCOPE_ENDPOINT in the environment names a mirror, HF_TOKEN an account.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast
from urllib.parse import urlencode

from common.errors import UserError, first_line, stoppable
from common.files import ROOT, atomic_folder, exclusive, explain_write_errors
from common.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

Answer = TypeVar("Answer")
STAGING = ".download"  # in the output folder: files that are not complete
ATTEMPTS = 5  # without a byte between them; huggingface_hub itself repeats some errors before
PAUSE_SECONDS = 2.0  # before the next attempt
MARGIN = 1 << 28  # bytes of the disk that stay free
MAX_UNPACKED = 1 << 28  # bytes in an archive; C-Eval has 4 MB
PAGE_SIZE = 200  # files that ModelScope may list; the data sets have some 20
TIMEOUT_SECONDS = 15.0  # for such an answer


@dataclass(frozen=True)
class DataSet:
    """Files of one repository on Hugging Face.

    Attributes:
        files: name in the repository -> name in the output folder; that of an archive is the folder for its content.
        revision: a commit where later ones lack the files, else a branch.
        megabytes: about, for the list; the exact sizes come from the hub.
        then: the command that reads the files in dataset/.
    """

    repo: str
    revision: str
    files: dict[str, str]
    megabytes: float
    licence: str
    then: str
    hub: ClassVar[str] = "https://huggingface.co"
    mirror: ClassVar[str] = "HF_ENDPOINT"  # the environment variable that names another address
    advice: ClassVar[str] = "name a mirror, for example HF_ENDPOINT=https://hf-mirror.com"

    @property
    def page(self) -> str:
        return f"{self.hub}/datasets/{self.repo}/tree/{self.revision}"

    @property
    def endpoint(self) -> str:
        return (os.environ.get(self.mirror) or self.hub).rstrip("/")

    @property
    def token(self) -> bool | None:
        return False if os.environ.get(self.mirror) else None  # a mirror gets no token

    def describe(self) -> list[RepoFile]:
        """Return what the hub says about the files that it has."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(self.endpoint, token=self.token)
        found = api.get_paths_info(self.repo, list(self.files), revision=self.revision, repo_type="dataset")
        return [info for info in found if isinstance(info, RepoFile)]

    def url(self, path: str) -> str:
        """Return the address of a file."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, path, repo_type="dataset", revision=self.revision, endpoint=self.endpoint)


class ModelScopeDataSet(DataSet):
    """Files of one repository on ModelScope, whose HTTP API is that of the package modelscope-hub."""

    hub = "https://www.modelscope.cn"
    mirror = "MODELSCOPE_ENDPOINT"
    advice = "leave --source out: Hugging Face has the data, too"
    token = False  # that of Hugging Face is not for others

    @property
    def page(self) -> str:
        return f"{self.hub}/datasets/{self.repo}/files"

    def describe(self) -> list[RepoFile]:
        from huggingface_hub.hf_api import RepoFile
        from huggingface_hub.utils import get_session, hf_raise_for_status

        query = urlencode({"Revision": self.revision, "PageSize": PAGE_SIZE})  # of the folder at the top
        response = get_session().get(
            f"{self.endpoint}/api/v1/datasets/{self.repo}/repo/tree?{query}", timeout=TIMEOUT_SECONDS
        )
        hf_raise_for_status(response)
        try:
            listed = {file["Path"]: file for file in response.json()["Data"]["Files"]}
            found = [
                (path, listed[path]["Size"], bytes.fromhex(listed[path]["Sha256"]))
                for path in self.files
                if path in listed
            ]
            if not all(len(sha256) == 32 for *_, sha256 in found):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"no list of files with hashes: {response.text:.200}") from None
        return [
            RepoFile(path=path, size=size, oid="", lfs={"oid": sha256.hex(), "size": size, "pointerSize": 0})
            for path, size, sha256 in found
        ]

    def url(self, path: str) -> str:
        query = urlencode({"Revision": self.revision, "FilePath": path})
        return f"{self.endpoint}/api/v1/datasets/{self.repo}/repo?{query}"


V1 = "8c92dcd0a57ce7bf6a7ce8fdb055139c4d9c35a1"  # the data of MiniMind-v1; later versions have other files
V3 = "312afb4f76391145c6902f765bb51691c09a12f5"
V3_VISION = "1e279a8b665cb10383451a6af6fd62b9f35bdd79"
TEXT_LICENCE = "Apache-2.0 and CC BY-NC 2.0"
DATA_SETS = {
    "pretrain": DataSet(
        "jingyaogong/minimind_dataset", V1, {"pretrain_data.csv": "pretrain_data.csv"}, 4660, TEXT_LICENCE,
        "python 1-pretrain.py",
    ),
    "sft": DataSet(
        "jingyaogong/minimind_dataset", V1,
        {"sft_data_single.csv": "sft_data_single.csv", "sft_data_multi.csv": "sft_data_multi.csv"}, 2190, TEXT_LICENCE,
        "python 3-full_sft.py",
    ),
    "dpo": DataSet(
        "jingyaogong/minimind_dataset", V1,
        {f"dpo/{name}": f"dpo/{name}" for name in ("dpo_train_data.json", "dpo_zh_demo.json", "huozi_rlhf_data.json")},
        38, TEXT_LICENCE, "python data_process.py dpo",
    ),
    "pretrain-mini": DataSet(
        "jingyaogong/minimind_dataset", V3, {"pretrain_t2t_mini.jsonl": "pretrain_t2t_mini.jsonl"}, 1241, TEXT_LICENCE,
        "python 1-pretrain.py --data_path dataset/pretrain_t2t_mini.jsonl",
    ),
    "sft-mini": DataSet(
        "jingyaogong/minimind_dataset", V3, {"sft_t2t_mini.jsonl": "sft_t2t_mini.jsonl"}, 1739, TEXT_LICENCE,
        "python 3-full_sft.py --data_path dataset/sft_t2t_mini.jsonl",
    ),
    "vlm": DataSet(
        "jingyaogong/minimind-v_dataset", V3_VISION,
        {"pretrain_i2t.parquet": "vlm_pretrain.parquet", "sft_i2t.parquet": "vlm_sft.parquet"}, 9261, "Apache-2.0",
        "python 8-pretrain_vlm.py",
    ),
    "ceval": DataSet(
        "ceval/ceval-exam", "main", {"ceval-exam.zip": "ceval/ceval-exam"}, 1.6, "CC BY-NC-SA 4.0",
        "python eval_ceval.py",
    ),
}  # fmt: skip
_MODELSCOPE_REPOS = {
    "pretrain-mini": "gongjy/minimind_dataset", "sft-mini": "gongjy/minimind_dataset", "vlm": "gongjy/minimind-v_dataset",
}  # fmt: skip
SOURCES: dict[str, dict[str, DataSet]] = {
    "huggingface": DATA_SETS,
    "modelscope": {
        name: ModelScopeDataSet(**vars(DATA_SETS[name]) | {"repo": repo, "revision": "master"})
        for name, repo in _MODELSCOPE_REPOS.items()
    },
}
UNPACKED = re.compile(r"(dev|val|test)/\w+\.csv")  # what is taken out of the archive of C-Eval


@dataclass(frozen=True)
class Wanted:
    """One file to download: where it is, where it goes, and what the hub says about it."""

    data: DataSet
    info: RepoFile
    target: Path

    @property
    def is_archive(self) -> bool:
        return self.info.path.endswith(".zip")


def list_data_sets(source: str) -> str:
    """Return a table of the data sets of a source by name."""
    rows = [
        f"  {name:<14} {data.megabytes:>9,.1f} MB  {data.licence:<28} {data.page}"
        for name, data in SOURCES[source].items()
    ]
    if source == "huggingface":
        rows.append(f"--source modelscope has {', '.join(SOURCES['modelscope'])}")
    return "\n".join(["data sets (licences as their cards on Hugging Face say; their sources may have others):", *rows])


def download(names: Sequence[str], out_dir: Path, source: str = "huggingface") -> None:
    """Download data sets into `out_dir`; continue where an earlier run was stopped, and skip what is there.

    Raises UserError if the hub has no such file or cannot be reached, another file has the name, the disk is too small, or
    what arrives is not what the hub says.
    """
    data_sets = [SOURCES[source][name] for name in dict.fromkeys(names)]
    staging = out_dir / STAGING
    kept = f"what was downloaded is kept in {staging}, and the same command continues"
    busy = f"another process is downloading into {out_dir}: wait for it, or choose another --out_dir"
    with explain_write_errors(out_dir, "another --out_dir", f"; {kept}"), exclusive(out_dir, "download", busy):
        wanted = [file for data in data_sets for file in _wanted(data, out_dir)]
        missing = [file for file in wanted if not _is_there(file)]
        if missing:
            print(_summary(missing), flush=True)
            _check_disk(missing, out_dir, staging)
        with stoppable(kept):
            for file in missing:
                _fetch(file, staging, kept)
                print(f"wrote {file.target}", flush=True)
        if staging.exists() and not any(staging.iterdir()):
            staging.rmdir()
    if out_dir.resolve() == ROOT / "dataset":
        for then in dict.fromkeys(data.then for data in data_sets):
            print(f"next: {then}")


def _wanted(data: DataSet, out_dir: Path) -> list[Wanted]:
    """Return the files of a data set, as the hub describes them."""
    found = {info.path: info for info in _ask(data.describe, data)}
    if gone := data.files.keys() - found.keys():
        raise UserError(f"{data.page} has no {', '.join(sorted(gone))} (any more): look there for what replaces it")
    return [Wanted(data, found[name], out_dir / local) for name, local in data.files.items()]


class _Unreachable(UserError):
    """The hub was not reached, or the connection was lost: another attempt may help."""


def _ask(request: Callable[[], Answer], data: DataSet) -> Answer:
    """Return what `request()` returns; turn errors of the hub into a UserError."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        return request()
    except HfHubHTTPError as error:
        kind = _Unreachable if error.response.status_code >= 500 else UserError
        raise kind(f"{data.repo}: the hub answers: {first_line(error)} Its page is {data.page}") from None
    except (HTTPError, OSError, ValueError) as error:
        if getattr(error, "errno", None) is not None:  # of the disk
            raise
        raise _Unreachable(
            f"{data.repo}: no useful answer from {data.endpoint} ({str(error) or repr(error)}). Try again later, or "
            f"{data.advice}"
        ) from None


def _is_there(file: Wanted) -> bool:
    """Return whether the file is complete on the disk, and say so. Raises UserError if another file has its name."""
    if not file.target.exists():
        return False
    if file.target.is_dir() != file.is_archive or not (file.is_archive or _is_intact(file.target, file.info)):
        raise UserError(
            f"{file.target} exists and is not the {file.info.path} of {file.data.page}: rename it, or choose another "
            "--out_dir"
        )
    print(f"{file.target} is already there", flush=True)
    return True


def _is_intact(path: Path, info: RepoFile) -> bool:
    """Return whether a file has the size and the hash that the hub says: SHA-256, or for small files that of Git."""
    if path.stat().st_size != info.size:
        return False
    with path.open("rb") as file:
        if info.lfs is not None:
            return hashlib.file_digest(file, "sha256").hexdigest() == info.lfs.sha256
        digest = hashlib.sha1(f"blob {info.size}\0".encode() + file.read(), usedforsecurity=False)
        return digest.hexdigest() == info.blob_id


def _summary(missing: list[Wanted]) -> str:
    lines = [f"  {file.info.size / 1e6:>10,.1f} MB  {file.info.path} -> {file.target}" for file in missing]
    pages = {file.data.page: file.data.licence for file in missing}
    card = "card on Hugging Face; its sources may have others"
    lines += [f"  licence: {licence} ({card}): {page}" for page, licence in pages.items()]
    return "\n".join(["to download:", *lines])


def _check_disk(missing: list[Wanted], out_dir: Path, staging: Path) -> None:
    """Print the space that is needed and free; raise UserError if it is too little."""
    begun = sum(part.stat().st_size for file in missing if (part := _part(file, staging)).exists())
    needed = max(sum(file.info.size * (4 if file.is_archive else 1) for file in missing) - begun, 0)
    free = shutil.disk_usage(out_dir).free
    print(f"  needed: {needed / 1e6:,.1f} MB, free in {out_dir}: {free / 1e6:,.1f} MB", flush=True)
    if needed + MARGIN > free:
        raise UserError(
            f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free in {out_dir}: free some space, or choose "
            "another --out_dir"
        )


def _part(file: Wanted, staging: Path) -> Path:
    """Return where a file is until it is complete: its name there is its hash."""
    return staging / f"{file.info.lfs.sha256 if file.info.lfs is not None else file.info.blob_id}.part"


def _fetch(file: Wanted, staging: Path, kept: str) -> None:
    """Load one file into `staging`, check it, and move it to its place; continue after lost connections."""
    from huggingface_hub.file_download import http_get  # hf_hub_download begins anew after an interruption
    from huggingface_hub.utils import build_hf_headers

    data, info = file.data, file.info
    staging.mkdir(exist_ok=True)
    part = _part(file, staging)
    part.touch()
    if part.stat().st_size > info.size:
        part.unlink()  # it can only be damaged
        part.touch()
    # Ranges count the bytes of the file only where an answer is not compressed.
    headers = build_hf_headers(token=data.token, headers={"Accept-Encoding": "identity"})
    failures = 0
    with Progress(info.path, info.size - part.stat().st_size) as progress:
        while True:
            before = part.stat().st_size
            try:
                with part.open("ab") as target:
                    load = partial(http_get, data.url(info.path), target, resume_size=before, headers=headers)
                    _ask(partial(load, expected_size=info.size, _tqdm_bar=cast(Any, progress)), data)
                    target.flush()
                    os.fsync(target.fileno())
                break
            except _Unreachable as error:
                failures = 1 if part.stat().st_size > before else failures + 1
                if failures == ATTEMPTS:
                    raise UserError(f"{error}; {kept}") from None
                time.sleep(PAUSE_SECONDS)
    if not _is_intact(part, info):
        part.unlink()
        raise UserError(f"{info.path} arrived damaged: its hash is not that of {data.page}. Run the same command again")
    file.target.parent.mkdir(parents=True, exist_ok=True)
    if file.is_archive:
        try:
            unpack(part, file.target)
        except UserError as error:
            raise UserError(f"{info.path} of {data.page}: {error}") from None
        finally:
            part.unlink()
    else:
        os.replace(part, file.target)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack C-Eval's dev/*.csv, val/*.csv and test/*.csv into `folder`, all or nothing, and nothing else."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if UNPACKED.fullmatch(member.filename)]
            if not any(member.filename.startswith("val/") for member in members):
                raise UserError("the archive has no folder val with CSV files: is it C-Eval?")
            if (size := sum(member.file_size for member in members)) > MAX_UNPACKED:
                raise UserError(f"the archive would unpack to {size:,} bytes: it is not C-Eval")
            with atomic_folder(folder) as tmp:
                for member in members:
                    target = tmp / member.filename
                    target.parent.mkdir(exist_ok=True)
                    target.write_bytes(file.read(member))
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged, encrypted, an unknown method
        raise UserError(f"the archive cannot be unpacked ({error})") from None
