"""Checkpoints by name: found in the cache of Hugging Face's hub, or downloaded into it."""

import errno
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from jpaged.models.checkpoint.config import read_json

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
"""The file of all weights, or the one that names several files with them."""

CONFIG_FILES = "config.json", "generation_config.json"
"""Files that describe a model without its weights."""

TOKENIZER_FILES = "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"
"""Files of a tokenizer, and all other JSON."""

_WEIGHTS = "*.safetensors"
"""Weights, of which only those are downloaded that the loader reads: no adapters, no copies in another dtype."""

CHECKPOINT_FILES = *TOKENIZER_FILES, _WEIGHTS

_IGNORED = "*/*", "consolidated*"
"""Copies of the weights in other formats, and examples: folders, and files of Mistral's own format."""

_PICKLES = ".bin", ".pt", ".pth", ".ckpt"

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")


class Repository(NamedTuple):
    """A model repository of the hub.

    Args:
        name: "ORG/NAME".
        revision: a branch, a tag or a commit; None is the main branch.
    """

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def repository_of(model: str | Path | None) -> Repository | None:
    """Return the repository that a string of the form ORG/NAME or ORG/NAME@REVISION names.

    Returns:
        The repository; None for a path, for a string of another form, and for a directory that exists.
    """
    if not isinstance(model, str) or Path(model).exists():
        return None
    found = _NAME.fullmatch(model)
    return None if found is None else Repository(*found.groups())


def find_checkpoint(model: str | Path, *, files: tuple[str, ...] = CHECKPOINT_FILES, use_tqdm: bool = True) -> Path:
    """Find the directory of a checkpoint; download files of a repository that the cache does not have.

    Nothing is requested if ``HF_HUB_OFFLINE`` is set, or if the revision is a commit whose files are in the cache. Code
    and pickles are never downloaded. Processes that share a cache download each file once: the hub's client locks it.

    Args:
        model: a directory, or ORG/NAME or ORG/NAME@REVISION.
        files: patterns of the files that are needed.
        use_tqdm: whether to show the progress of downloads.

    Raises:
        ValueError: the repository cannot be read, or a file cannot be downloaded; the message says what to do.
    """
    repository = repository_of(model)
    if repository is None:
        return Path(model)
    try:
        path = _download(repository, [name for name in files if name != _WEIGHTS], use_tqdm)
        names = _weights_of(path) if _WEIGHTS in files else []
        if names:  # of the same commit, which is the name of the directory
            _download(repository._replace(revision=path.name), names, use_tqdm)
    except Exception as error:  # the client and the libraries behind it raise many kinds
        raise ValueError(_explain(repository, error)) from error
    if names and not any((path / name).exists() for name in names):
        raise ValueError(_explain_no_weights(repository, path))
    return path


def _download(repository: Repository, patterns: list[str], use_tqdm: bool) -> Path:
    from huggingface_hub import snapshot_download  # takes half a second to import

    return Path(
        snapshot_download(
            repository.name,
            revision=repository.revision,
            allow_patterns=patterns,
            ignore_patterns=list(_IGNORED),
            tqdm_class=None if use_tqdm else _hidden_bar(),
        )
    )


def _weights_of(path: Path) -> list[str]:
    """List the weight files that the index of a directory names, or the one that needs no index."""
    index = path / WEIGHTS_INDEX
    named = read_json(index).get("weight_map") if index.is_file() else None
    names = set(named.values()) if isinstance(named, dict) else set()
    return sorted(name for name in names if str(name).endswith(".safetensors")) or [WEIGHTS_FILE]


def _hidden_bar() -> type[Any]:
    """Return a progress bar that is never shown."""
    from huggingface_hub.utils.tqdm import tqdm

    class HiddenBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": True})

    return HiddenBar


def _explain(repository: Repository, error: Exception) -> str:
    """Return the message of a failed download: the failure, and what to do."""
    from huggingface_hub import constants, errors

    name, cache = repository.name, constants.HF_HUB_CACHE
    revision = f" --revision {repository.revision}" if repository.revision else ""
    elsewhere = f"run hf download {name}{revision} where there is a network, or give a directory"
    status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return (
            f"{name} is gated, or the token may not read it: accept its terms at {constants.ENDPOINT}/{name}, then run "
            "hf auth login, or set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"{name} is no directory, and {constants.ENDPOINT} shows no such repository: correct the name. "
            "For a private repository run hf auth login, or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {repository.revision!r}: give a branch, a tag or a commit after the @"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            missing = f" ({_first_line(error)})" if isinstance(error, errors.IncompleteSnapshotError) else ""
            return (
                f"HF_HUB_OFFLINE is set, and the cache in {cache} has no complete copy of {repository}{missing}: "
                f"unset it, {elsewhere}"
            )
        cause = error.__cause__ or error
        return (
            f"{constants.ENDPOINT} cannot be reached ({_first_line(cause)}), and the cache in {cache} has no complete "
            f"copy of {repository}: check the network, {elsewhere}"
        )
    if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
        return f"the disk of {cache} is full: free space, or set HF_HOME to a directory on another disk"
    if isinstance(error, PermissionError):
        return f"{cache} cannot be written ({_first_line(error)}): set HF_HOME to a directory of yours"
    return f"{repository} cannot be downloaded ({type(error).__name__}: {_first_line(error)}): try again, {elsewhere}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _explain_no_weights(repository: Repository, path: Path) -> str:
    """Return the message for a repository without safetensors; ``path`` ends in the commit."""
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(repository.name, revision=path.name)
    except Exception:  # offline, say: the repository's other files stay unknown
        names = []
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if not pickles:
        return f"{repository} has no {WEIGHTS_FILE}, and no {WEIGHTS_INDEX}: only such weights are read"
    return (
        f"{repository} has pickles only ({pickles[0]}), which can run code when they are loaded, so they are not read: "
        "look for a revision or a repository with *.safetensors, or convert them with transformers' save_pretrained"
    )
