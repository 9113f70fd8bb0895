"""Names of models: folders here, or ids on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def find_folder(name: str | Path) -> Path | None:
    """The folder `name`, with `~` expanded; None for what can only be an id on the hub.

    Raises:
        ValueError: It can be neither.
    """
    path = Path(os.path.expanduser(name))  # which leaves unknown users as they are
    if str(name) and path.is_dir():
        return path
    if not HUB_ID.fullmatch(str(name)):
        raise ValueError("no such folder; give the folder of a model, or its id on the hub")
    return None


def ask_hub(name: str) -> None:
    """Look for a model on the hub once; the loaders would retry for a minute where there is no network.

    Args:
        name: An id.

    Raises:
        ValueError: The hub does not give it out, and nothing of it has been loaded before.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    if os.path.isdir(os.path.join(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
        return
    except EntryNotFoundError:
        return  # there it is, whatever it holds
    except RepositoryNotFoundError:
        reason = "no model of that name on the hub, or one that needs a login (hf auth login)"
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        # In passing, it seems: the loaders retry. Mirrors say 404 of a file too without saying of what.
        if status is None or status in (404, 408, 429) or status >= 500:
            return
        reason = f"the hub refuses it: {first_line(error)}"
    # The errors of the connection itself depend on the client's version, and are not OSError in all.
    except Exception as error:
        reason = f"the hub ({constants.ENDPOINT}) cannot be asked for it: {first_line(error)}"
    raise ValueError(f"no such folder, and {reason}")


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
