"""Folders that are whole or absent: a run that is killed at any moment leaves its last checkpoint loadable.

Everything is written into `.unfinished` inside the output folder, flushed to the disk, and only then renamed into its
place. A checkpoint is one rename. The output folder itself takes its files one by one; `config.json`, without which
no loader accepts a folder, goes first and comes last, so that old and new files are never taken for one model.
"""

import os
import shutil
import tempfile
import uuid
from pathlib import Path

UNFINISHED = ".unfinished"
PREFIX = "checkpoint-"


def check_writable(folder: Path, flag: str, unless: str | None = None) -> None:
    """Refuse a folder that is none, or that nothing can be written to; one that is not there yet is not made.

    Args:
        folder: The folder.
        flag: The flag that it came from, for the message.
        unless: A folder that holds a file of this name may be one that is only read.

    Raises:
        ValueError: Names the flag and the reason.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{flag} {folder}: a file is in the way; choose another folder")
        if unless and (folder / unless).is_file():
            return
        with tempfile.TemporaryDirectory(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            pass
    except OSError as error:
        raise ValueError(
            f"{flag} {folder}: nothing can be written there ({error.strerror}); choose another folder"
        ) from error


def new_file_mode(folder: Path) -> int:
    """The mode that a new file gets in `folder`, which follows the umask.

    safetensors writes through a temporary file that nobody but its owner may read.
    """
    probe = folder / f".{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink()


def share_files(folder: Path) -> None:
    """Give every file below `folder` the mode that a new file has there."""
    mode = new_file_mode(folder)
    for root, _, names in os.walk(folder):
        for name in names:
            os.chmod(os.path.join(root, name), mode)


def flush_folder(folder: Path) -> None:
    """Bring every file and folder below `folder` to the disk (fsync)."""
    for root, _, names in os.walk(folder):
        for name in names:
            flush(os.path.join(root, name))
        flush(root)


def flush(path: str | Path) -> None:
    """Bring one file to the disk, or of a folder the list of its names, and so the renames in it (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish_folder(stage: Path, target: Path) -> None:
    """Make `stage` the folder `target` in one step; both lie on one file system.

    Args:
        stage: A finished folder.
        target: Its name from now on. What lies there is replaced.
    """
    share_files(stage)
    flush_folder(stage)
    if target.exists():
        # A folder that is not empty cannot be renamed over. The old one stays whole beside the new one.
        os.replace(target, stage.with_name(f"replaced-{target.name}"))
    os.replace(stage, target)
    flush(target.parent)


def publish_files(stage: Path, target: Path) -> None:
    """Move the files of `stage` into the existing folder `target`, which is no model until the last one is there.

    Args:
        stage: A finished folder with a `config.json`.
        target: Folder that takes the files; weights of an earlier run that have no successor are removed.
    """
    share_files(stage)
    flush_folder(stage)
    (target / "config.json").unlink(missing_ok=True)
    # Else a model in one file would lie beside the shards of an earlier one.
    for stale in target.glob("model*.safetensors*"):
        stale.unlink()
    flush(target)
    for path in sorted(stage.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():  # a folder that is not empty cannot be renamed over
            shutil.rmtree(target / path.name, ignore_errors=True)
        os.replace(path, target / path.name)
    flush(target)


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints in an output folder, oldest step first."""
    found = [path for path in output.glob(f"{PREFIX}*") if path.is_dir() and path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]))
