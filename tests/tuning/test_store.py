"""Stored results are readable at every moment; a file that cannot be used is named and ignored."""

import importlib
import json
import math
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any
from zipimport import zipimporter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dragon import kernels
from dragon.kernels.config import LaunchConfig, default_config
from dragon.vm.torch.optim._backends import configs
from dragon.vm.tuning import store
from dragon.vm.tuning.run import summary

from .support import DEFAULT, SPEC, result

OLD, NEW = LaunchConfig(chunk=2048), LaunchConfig(chunk=4096)


def config_of(device: str = "Planted GPU", arch: str = "sm_90", numel: int = 100) -> LaunchConfig:
    configs._find.cache_clear()
    return configs.config_for(SPEC, arch, device, [numel])


def test_without_a_result_the_default_of_the_architecture_is_in_force() -> None:
    assert config_of() == DEFAULT
    assert config_of(arch="gfx942") == default_config("gfx942") != DEFAULT
    blocks = replace(SPEC, states=("q8_signed", "float32"))
    assert configs.config_for(blocks, "sm_90", "Planted GPU", [100]) == default_config("sm_90", blocks) != DEFAULT


def test_a_stored_result_is_in_force_for_its_kernel_device_and_size() -> None:
    path = store.save(result(NEW))
    assert config_of() == NEW
    assert list(store.scan()) == [(path, result(NEW))]
    assert config_of(device="Another GPU") == config_of(arch="sm_80") == config_of(numel=2**27) == DEFAULT
    assert store.save(result(OLD)) == path
    assert config_of() == OLD


def test_files_are_read_once_for_each_question(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    configs._find.cache_clear()
    monkeypatch.setattr(configs, "read_json", lambda path: (reads.append(path), result())[1])
    for _ in range(3):
        configs.config_for(SPEC, "sm_90", "Planted GPU", [100])
    assert len(reads) == 1


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edited_config(**changes: object) -> Any:
    return lambda path: edited(path, config=asdict(NEW) | changes)


def unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


BREAKS = {
    "cut off": (lambda path: path.write_text(path.read_text()[:-50]), "delimiter|Expecting|Unterminated"),
    "binary": (lambda path: path.write_bytes(b"\x80\x04\x95cos\nsystem\n" + bytes(range(256))), "decode"),
    "empty": (lambda path: path.write_text(""), "Expecting value"),
    "a folder": (unreadable, "directory"),
    "nested": (lambda path: path.write_text("[" * 100_000), "not JSON"),
    "a list": (lambda path: path.write_text("[]"), "schema"),
    "of another schema": (lambda path: edited(path, schema=1), "its schema is 1"),
    "stale": (lambda path: edited(path, kernel_hash="0" * 64), "stale"),
    "of another device": (lambda path: edited(path, device="Another GPU"), "foreign"),
    "of another architecture": (lambda path: edited(path, arch="sm_80"), "foreign"),
    "of another kernel": (lambda path: edited(path, spec=result()["spec"] | {"zero_grad": True}), "foreign"),
    "without times": (lambda path: edited(path, best_ms=None), "incomplete"),
    "with a text for a time": (lambda path: edited(path, copy_ms="0.8"), "'0.8' is no time"),
    "with true for a time": (lambda path: edited(path, copy_ms=True), "True is no time"),
    "with a time without end": (lambda path: edited(path, default_ms={"median": math.inf}), "inf is no time"),
    "with a time of 0": (lambda path: edited(path, best_ms={"median": 0}), "0 is no time"),
    "without a name": (lambda path: edited(path, kernel=None), "None is no text"),
    "without a reason": (lambda path: edited(path, reason=None), "None is no text"),
    "without a device": (lambda path: edited(path, device=None), "incomplete"),
    "with a strange spec": (lambda path: edited(path, spec=3), "incomplete"),
    "with an unknown field": (edited_config(blocks=3), "incomplete"),
    "with an odd chunk": (edited_config(chunk=1000), "launched with"),
    "with a chunk smaller than its threads": (edited_config(chunk=128, n_warps=8), "launched with"),
    "with a text for a number": (edited_config(n_stages="2"), "launched with"),
    "with true for a number": (edited_config(programs_per_processor=True), "launched with"),
    "with code for a hint": (edited_config(eviction="exit()"), "launched with"),
    "with a list for a hint": (edited_config(eviction=[]), "launched with"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_file_is_ignored_with_one_warning_that_names_it(kind: str) -> None:
    path = store.save(result(NEW))
    spoil, reason = BREAKS[kind]
    spoil(path)
    with pytest.warns(configs.TuningWarning, match=reason) as caught:
        assert config_of() == DEFAULT
    assert [str(path) in str(warning.message) for warning in caught] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert configs.config_for(SPEC, "sm_90", "Planted GPU", [100]) == DEFAULT
    ((ignored, why),) = store.scan()
    assert ignored == path
    assert isinstance(why, str)


def test_a_folder_that_cannot_be_searched_holds_no_file_to_warn_of(tuning_folder: Path) -> None:
    """As where the home of a user is /dev/null, or belongs to another one."""
    tuning_folder.touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_of() == DEFAULT
    assert list(store.scan()) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


PLACES = [*result(), *(("spec", name) for name in result()["spec"]), "config", ("best_ms", "median"), "copy_ms"]


@given(st.sampled_from(PLACES), JSON)
@example(("best_ms", "median"), 10**400)
@example("copy_ms", 10**400)
def test_nothing_in_a_file_is_more_than_no_result(place: str | tuple[str, str], value: object) -> None:
    data = result()
    path = configs.path_of(data["spec"], data["arch"], data["device"], data["size"])
    if isinstance(place, tuple):
        data[place[0]] = data[place[0]] | {place[1]: value}
    else:
        data[place] = value
    for own in (path, None):
        with suppress(ValueError):
            assert isinstance(configs.check_result(data, own), LaunchConfig)
            assert summary(data)


@pytest.mark.parametrize(
    ("field", "least", "most"),
    [("n_warps", 1, 32), ("chunk", 128, 2**16), ("n_stages", 1, 8), ("programs_per_processor", 0, 64)],
)
def test_a_configuration_is_within_what_triton_and_a_device_take(field: str, least: int, most: int) -> None:
    base = LaunchConfig(chunk=2048, n_warps=1)
    below = least // 2 if least > 1 else least - 1
    for value, is_good in ((least, True), (most, True), (below, False), (most * 2, False), (most + 1, False)):
        assert configs.is_launchable(replace(base, **{field: value}), 32) == is_good, value
    assert not configs.is_launchable(replace(base, n_warps=3), 32)


@pytest.mark.parametrize(("n_lanes", "most"), [(32, 32), (64, 16)])
def test_no_program_has_more_than_1024_threads(n_lanes: int, most: int) -> None:
    for n_warps in (most, 2 * most):
        config = LaunchConfig(chunk=2**16, n_warps=n_warps)
        assert configs.is_launchable(config, n_lanes) == (n_warps == most)


def test_each_thread_of_a_warp_of_64_has_an_element() -> None:
    config = LaunchConfig(chunk=128, n_warps=4)
    assert configs.check_result(result(config)) == config
    with pytest.raises(ValueError, match="no kernel can be launched"):
        configs.check_result(result(config, arch="gfx942"))


def test_tensors_are_classed_by_their_mean() -> None:
    sizes = {"small": ([1], [2**14 - 1]), "transformer": ([1, 2**15 - 1], [2**23 - 1]), "large": ([2**23],)}
    for size, lists in sizes.items():
        assert [configs.size_class(numels) for numels in lists] == [size] * len(lists)
    store.save(result(NEW))
    assert configs.config_for(SPEC, "sm_90", "Planted GPU", [1, 2**15 - 3]) == NEW
    assert configs.config_for(SPEC, "sm_90", "Planted GPU", [1, 2**15 - 1]) == DEFAULT


@pytest.mark.parametrize(
    "device", ["NVIDIA H200", "../../etc", "a/b\\c", "..", "", "名前", "x" * 500, "\ud800", "a\0b"]
)
def test_no_device_name_leaves_the_folder_or_is_too_long(device: str, tuning_folder: Path) -> None:
    path = store.save(result(NEW, device=device))
    assert path.resolve().is_relative_to(tuning_folder.resolve())
    assert len(path.relative_to(tuning_folder).parts) == 3
    for part in path.relative_to(tuning_folder).parts:
        assert len(part) <= configs.LONGEST_NAME + 5
        # Neither hidden nor an option of a command.
        assert not part.startswith((".", "-"))
    assert config_of(device=device) == NEW


def test_every_kernel_and_size_has_a_file_of_its_own() -> None:
    values = {
        "algorithm": ("adam", "sgd"),
        "param": ("float32", "bfloat16"),
        "grad": ("float32", "bfloat16"),
        "average": (None, "float32", "bfloat16"),
        "zero_grad": (False, True),
        "states": ([], ["float32"], ["float32", "bfloat16"]),
    }
    specs = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    assert values.keys() == configs.spec_fields(SPEC).keys()
    paths = {configs.path_of(spec, "sm_90", "x", size) for spec in specs for size in ("small", "large")}
    assert len(paths) == 2 * len(specs)


def test_results_move_between_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = tmp_path / "results.json"
    store.export_results(exported, [result(NEW), result(OLD, size="large")])
    monkeypatch.setenv(configs.FOLDER_VARIABLE, str(tmp_path / "elsewhere"))
    assert len(store.import_results(exported)) == 2
    assert (config_of(), config_of(numel=2**27)) == (NEW, OLD)


def test_an_export_leaves_old_files_of_others_alone(tmp_path: Path) -> None:
    # As a program leaves that fetches a file.
    (tmp_path / ".film.part").touch()
    os.utime(tmp_path / ".film.part", (0, 0))
    store.export_results(tmp_path / "results.json", [result()])
    assert {path.name for path in tmp_path.glob("[.r]*")} == {".film.part", "results.json"}


def test_an_export_replaces_what_a_link_leads_to(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    link(tmp_path / "link", tmp_path / "results.json")
    store.export_results(tmp_path / "link", [result()])
    assert (tmp_path / "link").is_symlink()
    assert len(store.import_results(tmp_path / "results.json")) == 1


def test_an_export_replaces_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="it is no regular file"):
        store.export_results(tmp_path, [result()])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes that are files")
def test_an_export_replaces_no_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="it is no regular file"):
        store.export_results(pipe, [result()])
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "no list"),
        ({"results": [result(), result(kernel_hash="0")]}, "result 1: stale"),
        ({"results": [3]}, "result 0: it is no result"),
        ({"results": [result(), result(size="huge")]}, "result 1: unknown size: 'huge'"),
    ],
)
def test_an_exported_file_that_cannot_be_used_stores_nothing(content: object, said: str, tmp_path: Path) -> None:
    exported = tmp_path / "results.json"
    exported.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        store.import_results(exported)
    assert list(store.scan()) == []


def test_the_folder_is_in_the_users_cache_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(configs.FOLDER_VARIABLE)
    monkeypatch.setenv("HOME", "/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert configs.tuning_dir() == Path("/caches/dragon-vm/tuning")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert configs.tuning_dir() == Path("/somebody/.cache/dragon-vm/tuning")


def module_at(spec: ModuleSpec | None) -> ModuleType:
    """A package that is found, but was not run."""
    assert spec is not None
    return module_from_spec(spec)


def test_the_hash_is_of_every_kernel_and_of_no_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(Path(kernels.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    of_release, new_hash = configs.kernel_hash(), configs.kernel_hash.__wrapped__
    monkeypatch.setattr(configs, "kernels", module_at(PathFinder.find_spec("kernels", [str(tmp_path)])))
    assert new_hash() == of_release
    for path in folder.glob("*.py"):
        content = path.read_bytes()
        path.write_bytes(content.replace(b"\n", b"\r\n"))
        assert new_hash() == of_release, "another system's ends of lines count"
        path.write_bytes(content + b"# changed")
        assert (new_hash() == of_release) == (path.name == "config.py")
        path.write_bytes(content)


def test_the_hash_is_the_same_in_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_release, new_hash = configs.kernel_hash(), configs.kernel_hash.__wrapped__
    archive = tmp_path / "application.zip"
    for content in (b"", b"# changed"):
        with zipfile.ZipFile(archive, "w") as file:
            for path in Path(kernels.__file__).parent.glob("*.py"):
                file.writestr(f"kernels/{path.name}", path.read_bytes() + content * (path.name == "norm.py"))
        importlib.invalidate_caches()
        monkeypatch.setattr(configs, "kernels", module_at(zipimporter(str(archive)).find_spec("kernels")))
        assert (new_hash() == of_release) == (content == b"")
