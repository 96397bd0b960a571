"""What is in force: this user's result before the package's, and that before the default."""

import dataclasses
from pathlib import Path

import pytest
import torch

from dragon.kernels import default_config
from dragon.kernels.config import LaunchConfig
from dragon.kernels.inspect import ARCHS, UPDATES
from dragon.vm.torch.optim import Adam
from dragon.vm.tuning import lookup, store
from dragon.vm.tuning.identity import arch_key
from dragon.vm.tuning.record import ESTIMATED, Record
from dragon.vm.tuning.sizes import SIZE_CLASSES, fingerprint

from .support import DEFAULT, VARIANT, record

MINE, YOURS, THEIRS = LaunchConfig(chunk=512), LaunchConfig(chunk=2048), LaunchConfig(chunk=4096)
NUMELS = [100, 200]


def config(device: str = "Planted GPU", arch: str = "90", numels: list[int] = NUMELS) -> LaunchConfig:
    return lookup.config_for(VARIANT, arch, device, numels)


def package(monkeypatch: pytest.MonkeyPatch, *records: Record) -> None:
    monkeypatch.setattr(lookup, "packaged", lambda arch: records if arch == "sm_90" else ())
    lookup._find.cache_clear()


@pytest.fixture(autouse=True)
def nothing_packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "forget", lookup._find.cache_clear)
    package(monkeypatch)


def test_nothing_known_means_the_default_of_the_architecture() -> None:
    assert config() == DEFAULT
    assert config(arch="gfx942") == default_config("gfx942") != DEFAULT
    assert lookup.find(VARIANT, "sm_90", "Planted GPU", "small").source == "default"


def test_the_users_result_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(record(MINE))
    package(monkeypatch, record(YOURS))
    assert config() == MINE
    found = lookup.find(VARIANT, "90", "Planted GPU", "small")
    assert found.source == "user"
    assert found.record is not None
    assert found.record.reason in found.why


def test_the_same_gpu_comes_before_its_relatives_and_those_before_estimates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    estimate = record(DEFAULT, basis=ESTIMATED, device="", times=None)
    relative, same = record(YOURS, device="Another GPU"), record(THEIRS)
    package(monkeypatch, estimate, relative, same)
    assert config() == THEIRS
    package(monkeypatch, estimate, relative)
    assert config() == YOURS
    package(monkeypatch, estimate)
    assert lookup.find(VARIANT, "90", "Planted GPU", "small").why.startswith("estimated: ")


def test_a_models_own_shapes_come_before_its_size_class() -> None:
    store.save(record(MINE))
    store.save(record(YOURS, size=fingerprint(NUMELS)))
    assert config() == YOURS
    assert config(numels=NUMELS[::-1]) == YOURS
    assert config(numels=[100, 201]) == MINE


def test_another_variant_device_or_size_is_another_question() -> None:
    store.save(record(MINE))
    assert lookup.config_for(VARIANT._replace(average=True), "90", "Planted GPU", NUMELS) == DEFAULT
    assert config(device="Another GPU") == DEFAULT
    assert config(arch="80") == DEFAULT
    assert config(numels=[2**27]) == DEFAULT


def test_files_are_read_once_for_each_question(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(lookup, "find_result", lambda *question: reads.append(question))
    lookup.forget()
    for _ in range(3):
        config()
    assert len(reads) == 2
    assert len(set(reads)) == 2


def test_a_broken_file_leaves_the_default_in_force() -> None:
    store.save(record(MINE)).write_text("{")
    with pytest.warns(store.TuningWarning):
        assert config() == DEFAULT


def test_the_optimizer_launches_what_is_stored(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from dragon.kernels import launch

    used = []
    original = launch.launch_update
    monkeypatch.setattr(launch, "launch_update", lambda v, c, *rest: (used.append(c), original(v, c, *rest)))
    param = torch.nn.Parameter(torch.ones(300, device=device))
    param.grad = torch.ones_like(param)
    from dragon.vm.torch.optim._triton import DeviceContext

    context = DeviceContext(device)
    name, arch = context.name, lookup.arch_name(context.arch)
    store.save(record(MINE, arch=arch, device=name, size=fingerprint([300])))
    lookup.forget()
    Adam([param], backend="triton").step()
    assert used == [MINE]


SHIPPED = sorted(Path(lookup.__file__).parent.glob("*.json"))


def test_there_are_packaged_defaults_for_every_architecture_that_is_inspected() -> None:
    assert {path.stem for path in SHIPPED} >= set(ARCHS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_packaged_defaults_answer_every_variant_and_size_and_say_what_they_rest_on(path: Path) -> None:
    records = store.read_bundle(path)
    assert {(entry.variant, entry.size) for entry in records} >= {
        (variant, size) for variant in UPDATES.values() for size in SIZE_CLASSES
    }
    for entry in records:
        assert entry.arch == path.stem
        if entry.basis == ESTIMATED:
            assert entry.times is None
            assert entry.device == ""
        else:
            store.check_current(entry)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_an_estimate_keeps_the_default_unless_the_compiler_is_against_it(path: Path) -> None:
    default = default_config(arch_key(path.stem))
    for entry in store.read_bundle(path):
        if entry.basis == ESTIMATED:
            assert (entry.config == default) == ("the default" not in entry.reason)


def test_a_packaged_measurement_of_other_kernels_is_left_out() -> None:
    stale = record(kernel_hash="0" * 64)
    assert not lookup._is_usable(stale)
    assert lookup._is_usable(record())
    assert lookup._is_usable(dataclasses.replace(stale, basis=ESTIMATED, times=None))
