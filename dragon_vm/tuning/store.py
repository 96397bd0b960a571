"""Where results live: one file each, written atomically, so that runs at the same time need no lock."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dragon.kernels.launch import Variant
from dragon.vm.tuning._fields import Fields, RecordError
from dragon.vm.tuning.identity import kernel_hash, slug
from dragon.vm.tuning.record import MEASURED, SCHEMA, Record, check_schema, dumps, loads, parse_record

FOLDER_VARIABLE = "DRAGON_VM_TUNING_DIR"

# A result is some 20 KB; nothing larger than this was written by us.
LARGEST_NBYTES = 2**24

_warned: set[Path] = set()


class TuningWarning(UserWarning):
    """A tuning file is ignored."""


class Ignored(NamedTuple):
    """A file that is not used, and why."""

    path: Path
    reason: str


def tuning_dir() -> Path:
    """The folder of this user's results: DRAGON_VM_TUNING_DIR, or in the user's cache."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder)
    import platformdirs

    return platformdirs.user_cache_path("dragon-vm", appauthor=False) / "tuning"


def variant_name(variant: Variant) -> str:
    """A variant as part of a file's name."""
    flags = (name for name in ("average", "zero_grad") if getattr(variant, name))
    return "-".join([*map(str, variant[:5]), *flags])


def path_of(arch: str, device: str, variant: Variant, size: str) -> Path:
    """The one file that can hold the result of a variant, device and size."""
    return tuning_dir() / slug(arch) / slug(device) / f"{variant_name(variant)}-{slug(size)}.json"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file, or leave it as it is: whoever reads it sees the old or the new text, whole.

    Raises:
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    # Not a `tempfile`, which nobody else may read: packaged files are written this way, too.
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name as durable as the file; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save(record: Record) -> Path:
    """Store a result in place of an earlier one of the same variant, device and size.

    Raises:
        OSError: if the folder cannot be written to.
    """
    path = path_of(record.arch, record.device, record.variant, record.size)
    write_atomically(path, dumps(record.as_json()))
    return path


def _read(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(LARGEST_NBYTES + 1)
    if len(content) > LARGEST_NBYTES:
        raise RecordError(f"larger than {LARGEST_NBYTES} bytes")
    return content.decode()


def check_current(record: Record) -> None:
    """Refuse what was measured with other kernels.

    Raises:
        RecordError: if the kernels' source has changed since.
    """
    if record.kernel_hash != kernel_hash(record.variant.algorithm):
        raise RecordError(f"stale: the source of the {record.variant.algorithm} kernel has changed since")


def read_result(path: Path) -> Record:
    """Read a result of this user.

    Raises:
        RecordError: if the file cannot be used; says why.
        FileNotFoundError: if there is none.
    """
    try:
        record = parse_record(loads(_read(path)))
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"unreadable: {error}") from None
    if record.basis != MEASURED:
        raise RecordError("not measured: estimates are read from the package only")
    if path != path_of(record.arch, record.device, record.variant, record.size):
        raise RecordError("foreign: it holds the result of something else than its name and folder say")
    check_current(record)
    return record


def ignore(path: Path, error: Exception) -> None:
    """Warn of a file that is ignored, once in the life of the process."""
    if path not in _warned:
        _warned.add(path)
        warnings.warn(f"tuning file {path} is ignored: {error}", TuningWarning, stacklevel=3)


def find_result(arch: str, device: str, variant: Variant, size: str) -> tuple[Path, Record] | None:
    """This user's result, if there is one; an unusable file is ignored with one warning."""
    path = path_of(arch, device, variant, size)
    try:
        return path, read_result(path)
    except FileNotFoundError:
        return None
    except RecordError as error:
        ignore(path, error)
        return None


def scan() -> tuple[list[tuple[Path, Record]], list[Ignored]]:
    """Every result of this user, and every file that cannot be used."""
    results, ignored = [], []
    for path in sorted(tuning_dir().glob("**/*.json")):
        try:
            results.append((path, read_result(path)))
        except FileNotFoundError:
            continue
        except RecordError as error:
            ignored.append(Ignored(path, str(error)))
    return results, ignored


def write_bundle(path: Path, records: Iterable[Record]) -> None:
    """Write many records to one file, to be packaged or carried to another machine.

    An earlier bundle of that name keeps what is not written anew: measurements join the estimates.

    Raises:
        RecordError: if the file is there and is no bundle.
        OSError: if it cannot be written.
    """
    merged = {_subject(record): record for record in (read_bundle(path) if path.exists() else ())}
    merged.update({_subject(record): record for record in records})
    write_atomically(path, dumps({"schema": SCHEMA, "records": [record.as_json() for record in merged.values()]}))


def _subject(record: Record) -> tuple[str, str, Variant, str]:
    """What a bundle holds one record of."""
    return record.arch, record.device, record.variant, record.size


def read_bundle(path: Path) -> list[Record]:
    """Records of a bundle, whatever they were measured with.

    Raises:
        RecordError: if it is none.
        OSError: if it cannot be read.
    """
    try:
        fields = Fields(loads(_read(path)))
    except UnicodeDecodeError as error:
        raise RecordError(f"unreadable: {error}") from None
    check_schema(fields)
    return [parse_record(entry) for entry in fields.values("records")]
