"""Results as files: one each, replaced atomically, so that runs at the same time need no lock."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dragon.vm.torch.optim._backends.configs import (
    FOLDER_VARIABLE,
    SCHEMA,
    check_result,
    path_of,
    read_json,
    tuning_dir,
)

# A file is written within milliseconds: an older part is left from a run that was killed.
STALE_SECONDS = 60.0

# Other programs have hidden parts too: only names of ours are removed.
_PART = ".{}.part"

Result = dict[str, Any]


def check_writable() -> None:
    """Make the folder of results and write in it, so that no search is in vain.

    Raises:
        ValueError: if that fails.
    """
    folder = tuning_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot store results in {folder} ({FOLDER_VARIABLE} names another): {error}") from None


def save(result: Result) -> Path:
    """Store a result in place of an earlier one of the same kernel, device and size.

    Raises:
        OSError: if the folder cannot be written to.
    """
    path = path_of(result["spec"], result["arch"], result["device"], result["size"])
    write_atomically(path, result)
    return path


def write_atomically(path: Path, data: Any) -> None:
    """Replace a file, or leave it as it is: whoever reads it sees the old or the new text, whole.

    Raises:
        OSError: if it cannot be written.
    """
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_parts(path.parent)
    part = path.parent / _PART.format(uuid.uuid4().hex)
    try:
        with part.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def remove_stale_parts(folder: Path) -> None:
    """Remove what killed runs have left in a folder."""
    for part in folder.glob(_PART.format("[0-9a-f]" * 32)):
        # Another run may remove it at the same time, or have it open on Windows, and it may be of another user.
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink()


def scan() -> Iterator[tuple[Path, Result | str]]:
    """Every file of results with its result, or why it is ignored."""
    for path in sorted(tuning_dir().glob("*/*/*.json")):
        try:
            result = read_json(path)
            check_result(result, path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            yield path, str(error)
        else:
            yield path, result


def export_results(path: Path, results: Iterable[Result]) -> None:
    """Write results to one file, to be carried to another machine; of a link, to what it leads to.

    Raises:
        OSError: if it cannot be written, and for a device, a pipe or a folder, which a file would replace.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file")
    write_atomically(path.resolve(), {"schema": SCHEMA, "results": list(results)})


def import_results(path: Path) -> list[Path]:
    """Store the results of an exported file.

    Raises:
        OSError: if a file cannot be read or written.
        ValueError: if it is no exported file, or one of the results cannot be used here; none is stored then.
    """
    try:
        data = read_json(path)
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    results = data.get("results") if isinstance(data, dict) else None
    if not isinstance(results, list):
        raise ValueError("it holds no list of results")
    for index, result in enumerate(results):
        try:
            check_result(result)
        except ValueError as error:
            raise ValueError(f"result {index}: {error}") from None
    return [save(result) for result in results]
