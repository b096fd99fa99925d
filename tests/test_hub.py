"""Checkpoints to and from the Hub, with a Hub that is a folder."""

import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import RepositoryNotFoundError
from worlds import mixed_recipe

from stages.errors import MmgenError, UsageError
from stages.hub import Address, parse_address, push, resolve
from stages.model import Model, build_model
from stages.training.checkpoint import save_checkpoint


class FolderHub:
    """The three calls of HfApi that mmgen makes, on a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.error: Exception | None = None
        self.asked: tuple[list[str] | None, Sequence[str]] = (None, ())

    def create_repo(self, repository: str, *, exist_ok: bool) -> None:
        (self.root / repository).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        path_in_repo: str | None,
        revision: str | None,
        ignore_patterns: Sequence[str],
        commit_message: str,
    ) -> None:
        target = self.root / repo_id / (path_in_repo or "")
        for path in folder_path.rglob("*"):
            name = path.relative_to(folder_path).as_posix()
            if path.is_file() and not any(fnmatch(name, pattern) for pattern in ignore_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)

    def snapshot_download(
        self, repository: str, *, revision: str | None, allow_patterns: list[str] | None, ignore_patterns: Sequence[str]
    ) -> str:
        if self.error:
            raise self.error
        self.asked = (allow_patterns, ignore_patterns)
        return str(self.root / repository)


@pytest.fixture
def hub(tmp_path: Path) -> FolderHub:
    return FolderHub(tmp_path / "hub")


@pytest.mark.parametrize(
    ("spec", "address"),
    [
        ("hf://org/name", Address("org/name")),
        ("hf://org/name/", Address("org/name")),
        ("hf://org/na-me.2@v1.0", Address("org/na-me.2", "v1.0")),
        ("hf://org/name@main/vq/tokenizer", Address("org/name", "main", "vq/tokenizer")),
    ],
)
def test_addresses(spec: str, address: Address) -> None:
    assert parse_address(spec) == address


@pytest.mark.parametrize(
    "spec", ["hf://name", "org/name", "hf://org/name/../other", "hf://datasets/org/name", "hf://org/na me", "hf://org/name@"]
)
def test_what_is_no_address_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        parse_address(spec)


def test_what_is_pushed_comes_back_without_training_state_or_pickles(tmp_path: Path, hub: FolderHub) -> None:
    checkpoint = tmp_path / "runs" / "vq"
    names = ["model.safetensors", "config.json", "recipe.toml", "README.md", "tokenizers/bpe-1/tokenizer.json", "metrics.jsonl"]
    private = ["state/step-00000007/.metadata", "old.pt", "x.pkl", ".mmgen/input/data-000000.tar"]
    for name in names + private:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text(name)
    assert push(checkpoint, "hf://me/vq", api=hub) == "https://huggingface.co/me/vq"  # type: ignore[arg-type]
    local = resolve("hf://me/vq", api=hub)  # type: ignore[arg-type]
    assert {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()} == set(names)


def test_a_folder_inside_a_repository_is_a_checkpoint_too(tmp_path: Path, hub: FolderHub) -> None:
    (tmp_path / "vq").mkdir()
    (tmp_path / "vq" / "config.json").write_text("{}")
    push(tmp_path / "vq", "hf://me/all/vq", api=hub)  # type: ignore[arg-type]
    assert (resolve("hf://me/all/vq", api=hub) / "config.json").is_file()  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no folder 'bpe'"):
        resolve("hf://me/all/bpe", api=hub)  # type: ignore[arg-type]


def test_of_a_repository_only_what_is_wanted_is_fetched(tmp_path: Path, hub: FolderHub) -> None:
    (tmp_path / "hub" / "me" / "lm" / "words").mkdir(parents=True)
    for spec, only, patterns in [
        ("hf://me/lm", "*.json", ["*.json"]),
        ("hf://me/lm/words", "*.json", ["words/*.json"]),
        ("hf://me/lm", "*", None),
        ("hf://me/lm/words", "*", ["words/*"]),
    ]:
        assert resolve(spec, only=only, api=hub).is_dir()  # type: ignore[arg-type]
        assert hub.asked is not None and hub.asked[0] == patterns


def test_a_file_of_weights_is_fetched_by_its_name(tmp_path: Path, hub: FolderHub) -> None:
    """With the config.json beside it. Pickled ones too: whoever asks for such a file reads nothing but its tensors."""
    (tmp_path / "hub" / "me" / "all" / "vae").mkdir(parents=True)
    (tmp_path / "hub" / "me" / "all" / "vae" / "vq.pth").write_bytes(b"weights")
    assert resolve("hf://me/all@main/vae/vq.pth", api=hub).read_bytes() == b"weights"  # type: ignore[arg-type]
    assert hub.asked == (["vae/vq.pth", "vae/config.json"], [])
    with pytest.raises(UsageError, match=r"no file 'vq\.pth'"):
        resolve("hf://me/all/vq.pth", api=hub)  # type: ignore[arg-type]
    assert hub.asked == (["vq.pth", "config.json"], [])


def test_a_local_folder_is_itself() -> None:
    assert resolve("runs/vq") == Path("runs/vq")


def test_hub_errors_are_explained(hub: FolderHub) -> None:
    hub.error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # its own constructor wants a response of the HTTP library
    with pytest.raises(UsageError, match="no such repository") as caught:
        resolve("hf://me/vq", api=hub)  # type: ignore[arg-type]
    assert "hf auth login" in caught.value.hint
    hub.error = ConnectionError("network is unreachable\nsecond line")
    with pytest.raises(MmgenError, match=r"did not answer as expected: network is unreachable$") as other:
        resolve("hf://me/vq", api=hub)  # type: ignore[arg-type]
    assert other.value.exit_code == 2  # not a fault of ours


def test_a_checkpoint_loads_through_the_mixin_of_the_hub_library(tmp_path: Path) -> None:
    """Anybody's class with `PyTorchModelHubMixin` reads our folder: config.json and model.safetensors are where it looks."""
    recipe = mixed_recipe()
    ours = build_model(recipe, 3)
    save_checkpoint(tmp_path / "model", recipe, ours.state_dict())

    class Theirs(Model, PyTorchModelHubMixin):
        def __init__(self, **config: Any) -> None:
            super().__init__(mixed_recipe())
            self.told = config

    theirs = Theirs.from_pretrained(str(tmp_path / "model"))
    assert theirs.told["model_type"] == "mmgen"
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
