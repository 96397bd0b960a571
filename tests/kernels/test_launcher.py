"""Launchers: code is looked up once for the same tables, and gets what a launch through triton would get."""

from typing import Any

import pytest
import torch

from dragon.kernels import LaunchConfig, Spec, launch
from dragon.kernels.norm import L2_NORM

SPEC = Spec("adam", "float32", "float32", ("float32", "float32"))


class Kernel:
    """Stands for a compiled kernel: notes what it is launched with, and by which way."""

    def __init__(self) -> None:
        self.looked_up: list[tuple[Any, ...]] = []
        self.ran: list[tuple[Any, ...]] = []
        self.compiled: list[tuple[Any, ...]] = []

    def warmup(self, *tables: Any, grid: Any, **constants: Any) -> None:
        self.compiled.append((grid, tables, constants))

    def __getitem__(self, grid: Any) -> Any:
        def look_up(*tables: Any, **constants: Any) -> "Code":
            self.looked_up.append((grid, tables, constants))
            return Code(self)

        return look_up


class Code:
    """What triton returns for a launch."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self._kernel.ran.append((grid, arguments))


LAUNCHERS = {
    "update": launch.update_launcher(SPEC, LaunchConfig(), 7, 2),
    "advance": launch.advance_launcher("adam", int(L2_NORM), False, 300),
    "norm": launch.norm_launcher("float32", int(L2_NORM), 5),
}


def addresses(given: list[torch.Tensor]) -> tuple[int, ...]:
    return tuple(table.data_ptr() for table in given)


def tables(n: int) -> list[torch.Tensor]:
    return [torch.zeros(4, dtype=torch.float64) for _ in range(n)]


def launcher_of(kernel: Kernel) -> launch.Launcher:
    return launch.Launcher("a name", kernel, 3, {"SPEC": SPEC, "WIDTH": 8}, {"num_warps": 4})


def test_code_is_looked_up_once_for_the_same_tables() -> None:
    kernel, own = Kernel(), tables(2)
    launcher = launcher_of(kernel)
    for _ in range(3):
        launcher(*own)
    assert kernel.looked_up == [((3, 1, 1), tuple(own), {"SPEC": SPEC, "WIDTH": 8, "num_warps": 4})]
    assert kernel.ran == [((3, 1, 1), (*addresses(own), SPEC, 8))] * 2


@pytest.mark.parametrize("change", ["address", "dtype", "alignment"])
def test_other_tables_are_looked_up_anew(change: str) -> None:
    kernel, own = Kernel(), tables(1)
    launcher = launcher_of(kernel)
    launcher(*own)
    other = {"address": tables(1)[0], "dtype": own[0].view(torch.int64), "alignment": own[0][1:]}[change]
    launcher(other)
    assert len(kernel.looked_up) == 2
    launcher(*own)
    launcher(other)
    assert [arguments[0] for _, arguments in kernel.ran] == [*addresses([*own, other])]


def test_a_launcher_remembers_a_few_sets_of_tables() -> None:
    kernel = Kernel()
    launcher = launcher_of(kernel)
    own = tables(3 * launch.MOST_READY)
    for table in own:
        launcher(table)
        assert len(launcher._ready) <= launch.MOST_READY
    launcher(own[-1])
    assert len(kernel.ran) == 1


def test_what_a_launch_needs_is_compiled_once_with_the_last_table_and_once_without() -> None:
    kernel, own = Kernel(), tables(2)
    launcher = launcher_of(kernel)
    for given in ([own[0], None], own) * 2:
        launcher.compile(*given)
        launcher(*given)
    assert kernel.compiled == kernel.looked_up
    assert [given for _, given, _ in kernel.compiled] == [(own[0], None), tuple(own)]
    first, second = addresses(own)
    assert [arguments for _, arguments in kernel.ran] == [(first, None, SPEC, 8), (first, second, SPEC, 8)]


@pytest.mark.parametrize(
    ("n_chunks", "programs_per_processor", "n_programs"), [(7, 0, 7), (7, 1, 2), (7, 2, 4), (3, 2, 3)]
)
def test_a_persistent_grid_has_some_programs_for_each_processor_and_no_more_than_chunks(
    n_chunks: int, programs_per_processor: int, n_programs: int
) -> None:
    config = LaunchConfig(programs_per_processor=programs_per_processor)
    assert launch.update_launcher(SPEC, config, n_chunks, 2)._grid == (n_programs, 1, 1)


@pytest.mark.parametrize("clip_each", [False, True])
@pytest.mark.parametrize("n_tensors", [1, 3, 4, 5, 128, 129, 1000])
def test_no_program_of_advance_is_without_a_row_and_no_row_without_a_program(
    n_tensors: int, clip_each: bool
) -> None:
    launcher = launch.advance_launcher("adam", int(L2_NORM), clip_each, n_tensors)
    n_rows = launcher._constants["ROWS"]
    assert (launcher._grid[0] - 1) * n_rows < n_tensors <= launcher._grid[0] * n_rows


@pytest.mark.parametrize("warp_size", [32, 64])
def test_programs_have_the_threads_that_are_asked_for_on_any_warp(warp_size: int) -> None:
    config = LaunchConfig(n_warps=2, n_stages=3)
    update = launch.update_launcher(SPEC, config, 7, 2, warp_size)
    assert update._constants["WARP_SIZE"] == warp_size
    assert (update._options["num_warps"], update._options["num_stages"]) == (2, 3)
    for launcher in (
        launch.advance_launcher("adam", int(L2_NORM), False, 300, warp_size),
        launch.norm_launcher("float32", int(L2_NORM), 5, warp_size),
    ):
        assert launcher._options["num_warps"] * warp_size == launch.REDUCTION_THREADS


@pytest.mark.parametrize("name", LAUNCHERS)
def test_no_kernel_contracts_what_another_path_would_round(name: str) -> None:
    assert LAUNCHERS[name]._options["enable_fp_fusion"] is False


@pytest.mark.parametrize("name", LAUNCHERS)
def test_constants_stand_in_the_order_of_the_kernels_parameters(name: str) -> None:
    launcher = LAUNCHERS[name]
    constants = list(launcher._constants)
    assert list(launcher._kernel.arg_names)[-len(constants) :] == constants


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"clip_norm": 0.1}], ids=str)
def test_a_launch_without_a_look_up_does_the_same(
    options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dragon.vm.torch.optim import Adam

    plain = launch.Launcher.__call__

    def through_triton(launcher: launch.Launcher, *tables: torch.Tensor) -> None:
        launcher._ready.clear()
        plain(launcher, *tables)

    results = []
    for call in (plain, through_triton):
        monkeypatch.setattr(launch.Launcher, "__call__", call)
        params = [torch.nn.Parameter(torch.ones(n, device="cuda")) for n in (5, 70_000)]
        optimizer = Adam(params, lr=0.1, **options)
        for step in range(4):
            for param in params:
                param.grad = torch.full_like(param, 0.1 + step)
            optimizer.step()
        results.append(params)
    assert all(map(torch.equal, *results))
