"""The store is readable at every moment, loses nothing to a neighbour, and names each file that it ignores."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dragon.kernels.config import LaunchConfig
from dragon.vm.tuning import store
from dragon.vm.tuning._fields import RecordError
from dragon.vm.tuning.record import ESTIMATED, Record
from dragon.vm.tuning.sizes import SIZE_CLASSES

from .support import VARIANT, record

OLD, NEW = LaunchConfig(chunk=2048), LaunchConfig(chunk=4096)

# A process that stores a result, and is killed before the n-th call to the operating system that the store makes.
KILLED_WRITER = """
import json, os, signal, sys
from dragon.vm.tuning import store
from dragon.vm.tuning.record import parse_record

class CountedOs:
    n_calls = 0
    def __getattr__(self, name):
        value = getattr(os, name)
        if not callable(value) or name == "fspath":
            return value
        def call(*arguments, **options):
            CountedOs.n_calls += 1
            if CountedOs.n_calls == {point}:
                os.kill(os.getpid(), signal.SIGKILL)
            return value(*arguments, **options)
        return call

record = parse_record(json.load(sys.stdin))
store.path_of(record.arch, record.device, record.variant, record.size)
store.os = CountedOs()
store.os.environ = os.environ
store.save(record)
print(CountedOs.n_calls)
"""

SAVES = """
import dataclasses, json, sys
from dragon.vm.tuning import store
from dragon.vm.tuning.record import parse_record

record = parse_record(json.load(sys.stdin))
for number in range({count}):
    store.save(dataclasses.replace(record, size=f"{name}-{{number}}"))
    store.save(dataclasses.replace(record, size="shared"))
"""


def start(code: str, stored: Record) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(stored.as_json()))
    process.stdin.close()
    process.stdin = None
    return process


def stored_config() -> LaunchConfig:
    found = store.find_result("sm_90", "Planted GPU", VARIANT, "small")
    assert found is not None
    return found[1].config


def test_a_stored_result_is_found_again() -> None:
    written = record(NEW)
    path = store.save(written)
    assert store.find_result("sm_90", "Planted GPU", VARIANT, "small") == (path, written)
    assert store.scan() == ([(path, written)], [])


def test_a_later_result_takes_the_place_of_the_earlier() -> None:
    assert store.save(record(OLD)) == store.save(record(NEW))
    assert stored_config() == NEW
    assert len(store.scan()[0]) == 1


def test_a_kill_between_any_two_writes_leaves_a_readable_store(tuning_folder: Path) -> None:
    store.save(record(OLD))
    process = start(KILLED_WRITER.format(point=0), record(OLD))
    n_calls = int(process.communicate()[0])
    assert n_calls >= 5, "the store writes in fewer steps than this test believes"
    seen = []
    for point in range(1, n_calls + 1):
        process = start(KILLED_WRITER.format(point=point), record(NEW))
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        seen.append(stored_config())
        assert store.scan()[1] == []
    assert set(seen) == {OLD, NEW}
    assert seen == sorted(seen, key=lambda config: config.chunk), "a result came and went"


def test_processes_at_once_lose_no_result() -> None:
    processes = [start(SAVES.format(count=20, name=name), record(NEW)) for name in ("left", "right")]
    for process in processes:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    results, ignored = store.scan()
    sizes = {found.size for _, found in results}
    assert sizes == {f"{name}-{number}" for name in ("left", "right") for number in range(20)} | {"shared"}
    assert ignored == []


def test_an_unwritable_folder_is_an_error_and_leaves_nothing_behind(
    tuning_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(record(OLD))

    def refuse(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="no space"):
        store.save(record(NEW))
    monkeypatch.undo()
    os.environ[store.FOLDER_VARIABLE] = str(tuning_folder)
    assert stored_config() == OLD
    assert [path.suffix for path in tuning_folder.rglob("*") if path.is_file()] == [".json"]
    del os.environ[store.FOLDER_VARIABLE]


def broken_json(path: Path) -> None:
    path.write_text(path.read_text()[:-50])


def binary(path: Path) -> None:
    path.write_bytes(b"\x80\x04\x95cos\nsystem\n" + bytes(range(256)))


def empty(path: Path) -> None:
    path.write_text("")


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


def huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(store.LARGEST_NBYTES + 1)


BREAKS = {
    "cut off": (broken_json, "not JSON"),
    "binary": (binary, "unreadable"),
    "empty": (empty, "not JSON"),
    "a folder": (unreadable, "unreadable"),
    "huge": (huge, "larger than"),
    "of another schema": (lambda path: edited(path, schema=2), "schema version 2"),
    "stale": (lambda path: edited(path, kernel_hash="0" * 64), "stale"),
    "of another device": (lambda path: edited(path, device="Another GPU"), "foreign"),
    "of another architecture": (lambda path: edited(path, arch="sm_80"), "foreign"),
    "edited by hand": (lambda path: edited(path, config={"chunk": 1000}), "config.n_warps is missing"),
    "a list": (lambda path: path.write_text("[]"), "no JSON object"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_file_is_ignored_with_one_warning_that_names_it(kind: str) -> None:
    path = store.save(record(NEW))
    spoil, reason = BREAKS[kind]
    spoil(path)
    with pytest.warns(store.TuningWarning) as caught:
        assert store.find_result("sm_90", "Planted GPU", VARIANT, "small") is None
    assert [str(path) in str(warning.message) and reason in str(warning.message) for warning in caught] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.find_result("sm_90", "Planted GPU", VARIANT, "small") is None
    results, ignored = store.scan()
    assert results == []
    assert [entry.path for entry in ignored] == [path]


def test_an_estimate_in_the_users_folder_is_not_believed() -> None:
    path = store.save(record(NEW))
    edited(path, basis=ESTIMATED, times=None)
    with pytest.warns(store.TuningWarning, match="not measured"):
        assert store.find_result("sm_90", "Planted GPU", VARIANT, "small") is None


@pytest.mark.parametrize("device", ["NVIDIA H200", "../../etc", "a/b\\c", "..", "名前"])
def test_no_device_name_leaves_the_folder(device: str, tuning_folder: Path) -> None:
    path = store.save(record(device=device))
    assert path.resolve().is_relative_to(tuning_folder.resolve())
    found = store.find_result("sm_90", device, VARIANT, "small")
    assert found is not None
    assert found[0] == path


def test_every_variant_and_size_has_a_file_of_its_own() -> None:
    flags = [VARIANT._replace(average=a, zero_grad=z) for a in (False, True) for z in (False, True)]
    paths = {store.path_of("sm_90", "x", variant, size) for variant in flags for size in SIZE_CLASSES}
    assert len(paths) == len(flags) * len(SIZE_CLASSES)


def test_a_bundle_carries_records_as_they_are(tmp_path: Path) -> None:
    written = [record(), dataclasses.replace(record(NEW), size="large")]
    store.write_bundle(tmp_path / "bundle.json", written)
    assert store.read_bundle(tmp_path / "bundle.json") == written
    (tmp_path / "bundle.json").write_text('{"schema": 1, "records": [3]}')
    with pytest.raises(RecordError, match=r"the file is no JSON object"):
        store.read_bundle(tmp_path / "bundle.json")


def test_measurements_join_the_estimates_of_a_bundle(tmp_path: Path) -> None:
    bundle = tmp_path / "sm_90.json"
    estimate = record(basis=ESTIMATED, device="", times=None, trials=())
    store.write_bundle(bundle, [estimate, record(OLD)])
    store.write_bundle(bundle, [record(NEW), record(NEW, size="large")])
    assert store.read_bundle(bundle) == [estimate, record(NEW), record(NEW, size="large")]
    bundle.write_text("something of the user's")
    with pytest.raises(RecordError):
        store.write_bundle(bundle, [record(NEW)])
    assert bundle.read_text() == "something of the user's"


def test_without_a_variable_results_are_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(store.FOLDER_VARIABLE)
    assert store.tuning_dir().parts[-2:] == ("dragon-vm", "tuning")
