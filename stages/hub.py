"""Checkpoints on the Hugging Face Hub: `hf://org/name` in, `hf://org/name` out.

A checkpoint folder is a model repository as it stands. What travels is weights, configuration, recipe, tokenizers, model card and
the record of the run; training state stays at home, in both directions (nothing but training needs it, and its metadata is a pickle).
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from stages.errors import DataError, MmgenError, UsageError
from stages.escape import visible
from stages.files import files_inside

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hf://"
WEIGHTS = (
    ".safetensors",
    ".pt",
    ".pth",
    ".ckpt",
    ".bin",
    ".gguf",
)  # a file by its name is fetched whatever it is; who reads it runs nothing
NEVER = ["state/*", ".mmgen/*", ".*.tmp", "*.pkl", "*.pickle", "*.pt", "*.pth", "*.bin", "*.ckpt"]  # training state, and what may hold code


@dataclass(frozen=True)
class Address:
    """A model repository, a revision of it (None: the newest), and a folder or file of weights inside it ("": the whole)."""

    repository: str
    revision: str | None = None
    folder: str = ""


def parse_address(spec: str) -> Address:
    """`hf://org/name[@revision][/folder]` → its parts. Raises UsageError."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+?))?/?", spec)
    folder = (match[3] or "") if match else ""
    if match is None or ".." in folder.split("/"):
        raise UsageError(f"{spec}: expected hf://ORG/NAME", hint="a revision or a folder may follow: hf://ORG/NAME@REVISION/FOLDER")
    if match[1].split("/")[0] in ("datasets", "spaces"):
        raise UsageError(f"{spec}: expected a model, found a repository of {match[1].split('/')[0]}", hint="data goes where SHARDS go")
    return Address(match[1], match[2], folder)


def is_model(spec: str) -> bool:
    """Whether this names a model repository, and not data or a path."""
    return spec.startswith(SCHEME) and not spec.startswith((SCHEME + "datasets/", SCHEME + "spaces/"))


def resolve(spec: str | Path, *, only: str = "*", api: "HfApi | None" = None) -> Path:
    """The local folder of a checkpoint, or file of weights: itself, or for `hf://...` the downloaded copy (kept in the Hub's own cache).

    only: a pattern, where of a folder not everything is wanted.

    Raises UsageError when the address is malformed, there is no such repository, folder or file, or the Hub is out of reach.
    """
    if not str(spec).startswith(SCHEME):
        return Path(spec)
    address = parse_address(str(spec))
    is_file = address.folder.endswith(WEIGHTS)
    patterns = [f"{address.folder}/{only}"] if address.folder else [only] if only != "*" else None
    if is_file:  # with the config.json beside it
        patterns = [address.folder, (PurePosixPath(address.folder).parent / "config.json").as_posix()]
    with hub_errors(str(spec)):
        local = (api or _api()).snapshot_download(
            address.repository, revision=address.revision, allow_patterns=patterns, ignore_patterns=[] if is_file else NEVER
        )
    found = Path(local) / address.folder
    if not (found.is_file() if is_file else found.is_dir()):
        raise UsageError(f"{spec}: the repository {address.repository} has no {'file' if is_file else 'folder'} '{address.folder}'")
    return found


def push(folder: Path, spec: str, *, api: "HfApi | None" = None) -> str:
    """Uploads a checkpoint folder, without its training state, to a repository that is made when absent. Returns its web address.

    DataError, before anything is sent, where a link or a pipe is among the files: what it leads to is not ours to give away.
    """
    address = parse_address(spec)
    for path, reason in files_inside(folder)[1]:
        if not any(fnmatch(path.relative_to(folder).as_posix(), pattern) for pattern in NEVER):
            raise DataError(f"{path}: {reason}; nothing was uploaded", hint="put the file itself there, or remove it")
    api = api or _api()
    with hub_errors(spec):
        api.create_repo(address.repository, exist_ok=True)
        api.upload_folder(
            repo_id=address.repository,
            folder_path=folder,
            path_in_repo=address.folder or None,
            revision=address.revision,
            ignore_patterns=NEVER,
            commit_message=f"mmgen checkpoint {visible(folder.name)}",
        )
    return f"https://huggingface.co/{address.repository}"


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi()


@contextmanager
def hub_errors(spec: str) -> Iterator[None]:
    """Explains what the Hub's client raises, in a sentence: always a UsageError, but for a disk that is full here."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except MmgenError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError):
        hint = "check the spelling; a private repository needs `hf auth login`"
        raise UsageError(f"{spec}: the Hub has no such repository or revision, or you may not see it", hint=hint) from None
    except HFValidationError as error:
        raise UsageError(f"{spec}: {error}") from None
    except Exception as error:  # whatever its answer makes of the client: HTTP errors of several libraries, missing keys, broken JSON
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        lines = (str(error).strip() or type(error).__name__).splitlines()
        raise UsageError(f"{spec}: the Hub did not answer as expected: {lines[0]:.400}", hint="try again, or give a local folder") from None
