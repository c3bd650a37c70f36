"""A base model's directory: a local one as it is, a hub id downloaded into the cache."""

import re
from pathlib import Path

from onebase_server.errors import ConfigurationError

NEEDED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
"""What a base is loaded from; a repository's other formats of the same weights stay where they are."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_base(base: str, revision: str | None, cache_dir: Path) -> Path:
    """The directory of a base, downloaded with a progress bar if `base` is a hub id that is not in the cache.

    A `revision` that is a commit hash pins the files for good; a branch's name takes what it is today.

    Raises:
        ConfigurationError: there is no such directory, or no such model on the hub, or the hub is out of reach.
    """
    path = Path(base).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigurationError(f"--revision is for a hub id, but {base} is a directory on this machine.")
        return path
    if path.exists() or not _HUB_ID.fullmatch(base):
        raise ConfigurationError(f"{base} is neither a directory on this machine nor a hub id such as org/model.")
    return _download(base, revision, cache_dir / "hub")


def _download(base: str, revision: str | None, directory: Path) -> Path:
    # here, so that a server of a local base does without the hub's library: 10 MiB and a third of a second
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(base, revision=revision, cache_dir=directory, allow_patterns=NEEDED_FILES))
    except GatedRepoError as error:
        raise ConfigurationError(
            f"{base} is gated: accept its terms on the hub, then set HF_TOKEN to a token of yours."
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigurationError(f"There is no {base} on the hub, and no such directory on this machine.") from error
    except RevisionNotFoundError as error:
        raise ConfigurationError(f"{base} has no revision {revision} on the hub.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigurationError(
            f"{base} is not a directory on this machine, and the hub could not be asked for it ({reason}). "
            "Without internet, pass the path of a local Hugging Face directory."
        ) from error
