"""A file of results is whole at every moment, whoever is killed, interrupted, or writes at the same time."""

import json
import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dragon.vm.torch.optim._backends import configs
from dragon.vm.tuning import store

from ..forking import Forking
from .support import result
from .test_store import NEW, OLD, config_of

# For each number that it reads, a forked process that stores a result and is killed before that one of the calls
# by which a file is written. Its answer is the number of such calls, or that of the signal, below 0.
KILLED_WRITERS = """
import json, os, signal, sys
from pathlib import Path
from dragon.vm.tuning import store

n_calls = point = 0
def counted(function):
    def call(*arguments, **options):
        global n_calls
        n_calls += 1
        if n_calls == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

result = json.loads(sys.stdin.readline())
os.fsync, os.replace = counted(os.fsync), counted(os.replace)
Path.mkdir, Path.open = counted(Path.mkdir), counted(Path.open)
for point in map(int, sys.stdin):
    child = os.fork()
    if child == 0:
        store.save(result)
        os._exit(n_calls)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

SAVES = """
import json, sys
from dragon.vm.tuning import store

result = json.load(sys.stdin)
for number in range(6):
    store.save(dict(result, device=f"{name}-{{number}}"))
    store.save(dict(result, device="shared"))
"""


def start(python: Path, code: str, data: dict[str, Any]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [python, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(data))
    process.stdin.close()
    process.stdin = None
    return process


def test_a_kill_between_any_two_writes_leaves_a_readable_result_and_no_parts(
    tuning_folder: Path, forking: Forking, tmp_path: Path
) -> None:
    store.save(result(OLD))
    command, pipe = [forking.executable(tmp_path / "python"), "-c", KILLED_WRITERS], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:

        def ask(value: object) -> int:
            print(value, file=process.stdin, flush=True)
            return int(process.stdout.readline())

        print(json.dumps(result(NEW)), file=process.stdin)
        for point in range(1, 5):
            assert ask(point) == -signal.SIGKILL, "a result is written in fewer steps than this test believes"
            assert config_of() == OLD
        while ask(point := point + 1) == -signal.SIGKILL:
            assert config_of() == OLD
        assert config_of() == NEW
        process.stdin.close()
    store.save(result(OLD))
    parts = list(tuning_folder.rglob("*.part"))
    assert parts
    for part in parts:
        os.utime(part, (0, time.time() - 2 * store.STALE_SECONDS))
    fresh = parts[0].with_name(f".{'0' * 32}.part")
    fresh.touch()
    store.save(result(NEW))
    assert config_of() == NEW
    assert list(tuning_folder.rglob("*.part")) == [fresh]


def test_processes_at_once_lose_no_result(forking: Forking, tmp_path: Path) -> None:
    python = forking.executable(tmp_path / "python")
    processes = [start(python, SAVES.format(name=name), result(NEW)) for name in ("left", "right")]
    for process in processes:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    paths = [path for path, _ in store.scan()]
    assert paths == sorted(paths)
    devices = {found["device"] for _, found in store.scan() if isinstance(found, dict)}
    assert devices == {f"{name}-{number}" for name in ("left", "right") for number in range(6)} | {"shared"}


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt("pressed")], ids=repr)
def test_a_write_that_fails_or_is_interrupted_leaves_nothing_behind(
    error: BaseException, tuning_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(result(OLD))

    def refuse(*arguments: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(type(error), match=str(error)):
            store.save(result(NEW))
    assert config_of() == OLD
    assert [path.suffix for path in tuning_folder.rglob("*") if path.is_file()] == [".json"]


def test_the_whole_text_is_on_the_disk_before_it_replaces_another(monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: on_disk.append(os.fstat(handle).st_size))
    path = store.save(result(NEW))
    assert on_disk == [path.stat().st_size]


def test_a_number_that_is_not_in_json_is_never_written(tuning_folder: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.save(result(copy_ms=math.nan))
    assert not [path for path in tuning_folder.rglob("*") if path.is_file()]


def test_a_part_that_cannot_be_removed_is_no_error(tuning_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.save(result())
    stale = path.with_name(f".{'0' * 32}.part")
    stale.touch()
    os.utime(stale, (0, 0))

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError("it is of another user, or open on Windows")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert store.save(result()) == path
    assert stale.exists()


def test_a_part_that_another_run_removes_first_is_no_error(
    tuning_folder: Path, link: Callable[[Path, Path], None]
) -> None:
    path = store.save(result(OLD))
    # In the listing of the folder, and gone where it is looked at.
    link(path.with_name(f".{'0' * 32}.part"), tuning_folder / "nowhere")
    store.save(result(NEW))
    assert config_of() == NEW


def test_a_result_that_is_removed_while_results_are_listed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gone, kept = sorted(store.save(result(NEW, size=size)) for size in ("small", "large"))
    read_json = store.read_json

    def read_late(path: Path) -> Any:
        gone.unlink(missing_ok=True)
        return read_json(path)

    monkeypatch.setattr(store, "read_json", read_late)
    assert [path for path, _ in store.scan()] == [kept]


def test_a_folder_in_which_no_file_can_be_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> Any:
        raise PermissionError(f"not in {dir}")

    store.check_writable()
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=f"cannot store results in .*{configs.FOLDER_VARIABLE}.*not in "):
        store.check_writable()
