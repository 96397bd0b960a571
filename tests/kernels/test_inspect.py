"""The generated code, for GPUs that are not here: compiled in a process without TRITON_INTERPRET."""

import inspect
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from dragon.kernels.config import LaunchConfig
from dragon.kernels.inspect import ADVANCES, ARCHS, MODES, NORMS, UNSCALES, UPDATES, compile_update
from dragon.kernels.inspect.compile import Compiled
from dragon.kernels.launch import REDUCTION_THREADS
from dragon.kernels.norm import TILE, norm_kernel
from dragon.kernels.spec import Spec
from dragon.kernels.update import update_kernel

# Bytes a thread. The assembler of triton 3.9 spills some of `advance_kernel`'s registers for sm_80.
ADVANCE_SPILLS = 0 if tuple(map(int, version("triton").split(".")[:2])) < (3, 9) else 16

# Bytes that an element takes at least: each tensor read once, and all but the gradient written once.
FLOOR = {
    "adam fp32": 28,
    "adam fp32 amsgrad": 36,
    "adam fp32 average": 36,
    "adam fp32 zero_grad": 32,
    "adam bf16": 14,
    "adam bf16 fp32-state": 22,
    "adam bf16 fp32-grad": 16,
    "adam bf16 fp32-grad fp32-state": 24,
    "adam fp16": 14,
    "adam fp64": 56,
    "sgd fp32": 12,
    "sgd fp32 momentum": 20,
    "sgd bf16 momentum": 10,
    "accumulate fp32": 12,
    "accumulate fp32 bf16-grad": 10,
    # The gradient is written as well.
    "adam fp32 unscale": 32,
    "adam bf16 unscale": 16,
    "adam fp16 unscale": 16,
    "sgd fp32 momentum unscale": 24,
}

I32_ARITHMETIC = re.compile(r"arith\.(?:add|sub|mul|shl|divs|rems)\w* .*: (?:tensor<[\dx]+)?i32>? loc")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "dragon.kernels.inspect", *arguments]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)


# Registers a thread of the kernels that most steps run: with at most 64 a multiprocessor holds 8 programs.
N_REGISTERS = {
    "adam fp32": 64,
    "adam bf16": 64,
    "adam bf16 fp32-state": 64,
    "adam fp32 amsgrad": 80,
    "adam fp32 unscale": 72,
    "adam bf16 unscale": 72,
}

# What reads a double and rounds it, in PTX.
NARROWING = re.compile(r"cvt\.rn\.f32\.f64")


# Names of the kernels, and texts in the names of those that stand for all: one architecture has them all.
EVERY = {*UPDATES, *MODES, *UNSCALES, *NORMS, *ADVANCES}
SOME = ("adam fp32", "fp32-state", "q8 stochastic", "norm L2", "norm inf", "norm clip-each")
HAS_EVERY = ARCHS if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else ("sm_90",)


@pytest.fixture(scope="module", params=ARCHS)
def inspected(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, dict[str, Any]], Path]:
    """An architecture, the reports of kernels on it by name, and the folder of their code."""
    folder = tmp_path_factory.mktemp(request.param)
    texts = () if request.param in HAS_EVERY else SOME
    wanted = [argument for text in texts for argument in ("--kernel", text)]
    done = run("--arch", request.param, "--json", "--dump", str(folder), *wanted)
    assert done.returncode == 0, done.stderr
    reports = {report["kernel"]: report for report in json.loads(done.stdout)}
    expected = {name for name in EVERY if not texts or any(text in name for text in texts)}
    assert reports.keys() == expected
    assert len(expected) >= 14
    return request.param, reports, folder


def test_every_kernel_is_all_vector_without_spills(inspected) -> None:
    _, reports, _ = inspected
    wide = {name: r for name, r in reports.items() if r["paths"] and name not in MODES}
    narrow = {name: r["paths"] for name, r in wide.items() if not r["is_vectorized"]}
    assert narrow == {}, "accesses of less than 16 bytes on the vector path"
    spilled = {name: r["spilled_nbytes"] for name, r in reports.items() if r["spilled_nbytes"]}
    # It runs a few threads a tensor, once a step.
    assert {name for name, nbytes in spilled.items() if name not in ADVANCES or nbytes > ADVANCE_SPILLS} == set()
    assert FLOOR.keys() == {*UPDATES, *UNSCALES}
    found = {name: r["nbytes_per_element"] for name, r in reports.items() if name in FLOOR}
    assert found == {name: FLOOR[name] for name in found}
    for name in reports.keys() & {*FLOOR, *NORMS}:
        assert reports[name]["paths"]["tail"]["loads"], f"{name}: no tail was recognised"
        assert reports[name]["paths"]["misaligned"]["loads"], f"{name}: no misaligned path was recognised"


def test_memory_modes_access_whole_lines(inspected) -> None:
    _, reports, _ = inspected
    for name in reports.keys() & MODES:
        path = reports[name]["paths"]["vector"]
        # A warp takes 128 bytes and more of each tensor: 4 bytes a thread are scales, of whole blocks of 64, and
        # the step counter.
        narrow = {width: n for kind in ("loads", "stores") for width, n in path[kind].items() if int(width) < 4}
        assert narrow == {}, name
        one_byte = 2 + ("split8" in name) if "q8" in name else 0
        assert path["stores"].get("8", 0) == one_byte, name


def test_every_kernel_takes_only_pointers_and_counts_in_64_bits(inspected) -> None:
    _, reports, folder = inspected
    arguments = {kind for r in reports.values() for kind in r["arguments"].values()}
    assert {kind for kind in arguments if not kind.startswith("!tt.ptr<")} == set()
    dumped = list(folder.glob("*.ttir"))
    assert len(dumped) == len(reports)
    # Bits of numbers are rounded as int32; the offsets are those of the other kernels.
    rounding = tuple(f"{name.replace(' ', '_')}." for name in MODES)
    for path in (path for path in dumped if not path.name.startswith(rounding)):
        assert I32_ARITHMETIC.findall(path.read_text()) == [], f"{path.name}: an offset of 32 bits may wrap around"


def test_a_norm_takes_at_most_60_instructions_a_thread_and_tile(inspected) -> None:
    _, reports, _ = inspected
    elements_of_a_tile = TILE.value / REDUCTION_THREADS
    for name in reports.keys() & NORMS:
        assert 0 < reports[name]["instructions_per_element"] * elements_of_a_tile <= 60, name


def test_registers_leave_room_for_eight_programs(inspected) -> None:
    _, reports, _ = inspected
    assert N_REGISTERS.keys() <= EVERY
    registers = {name: reports[name]["registers"] for name in reports.keys() & N_REGISTERS}
    assert {name: n for name, n in registers.items() if n > N_REGISTERS[name]} == {}


def test_an_update_reads_tables_in_at_most_8_loads_and_converts_no_scalar(inspected) -> None:
    arch, reports, folder = inspected
    for name in reports.keys() & {**UPDATES, **UNSCALES}:
        wide = "fp64" in name
        # Four scalars of float64 are two loads of 16 bytes.
        assert reports[name]["table_loads"] <= (11 if wide else 8), name
        if arch.startswith("sm_"):
            assert reports[name]["table_loads"] >= 4, f"{name}: table loads were not recognised"
            ptx = (folder / f"{name.replace(' ', '_')}.{arch}.ptx").read_text()
            assert NARROWING.findall(ptx) == [], name


def test_all_loads_of_a_tile_are_issued_before_the_first_use(inspected) -> None:
    arch, reports, _ = inspected
    names = [name for name in reports.keys() & UPDATES if name.startswith("adam") and "fp64" not in name]
    assert {"adam fp32", "adam bf16 fp32-state"} <= set(names)
    expected = dict.fromkeys(names, 0 if arch.startswith("sm_") else None)
    if arch == "sm_100" and tuple(map(int, version("triton").split(".")[:2])) >= (3, 8):
        # Of a fifth tensor it waits for two loads.
        expected |= {"adam fp32 amsgrad": 2, "adam fp32 average": 2}
    assert {name: reports[name]["late_loads"] for name in names} == expected


@pytest.mark.parametrize("kernel", [update_kernel, norm_kernel])
def test_a_kernel_takes_at_most_8_arguments(kernel) -> None:
    assert 0 < len(inspect.signature(kernel.fn).parameters) <= 8


def test_the_search_for_narrow_offsets_finds_one() -> None:
    assert I32_ARITHMETIC.search("%1 = arith.muli %0, %c : i32 loc(#loc1)")
    assert I32_ARITHMETIC.search("%1 = arith.addi %0, %c : tensor<128xi32> loc(#loc1)")
    assert not I32_ARITHMETIC.search("%1 = arith.addi %0, %c : tensor<128xi64> loc(#loc1)")


CANDIDATES = """
from dragon.kernels.config import LaunchConfig
from dragon.kernels.inspect import UPDATES, compile_update
persistent = LaunchConfig(512, eviction="evict_first", programs_per_processor=2)
whole = compile_update(UPDATES["adam fp32"], persistent, "sm_90")
narrow = compile_update(UPDATES["adam bf16"], LaunchConfig(512), "sm_90")
huge = compile_update(UPDATES["sgd fp32"], LaunchConfig(16384), "sm_90")
print(whole.is_vectorized, narrow.is_vectorized, huge.spilled_nbytes > 0)
print(whole.elements, whole.nbytes_per_element, narrow.paths["vector"].loads)
"""


def test_a_candidate_configuration_is_judged_without_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CANDIDATES], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["True False True", "4.0 28.0 {8: 4}"], done.stderr


OTHER_ARCHS = """
from dragon.kernels.config import default_config
from dragon.kernels.inspect import UPDATES, compile_update
spec = UPDATES["adam bf16"]
for arch in ("sm_120", "gfx90a", "gfx1100"):
    report = compile_update(spec, default_config(arch, spec), arch)
    loads = report.paths["vector"].loads
    print(arch, report.is_vectorized, report.spilled_nbytes, loads, report.nbytes_per_element)
"""


def test_gpus_of_other_generations_get_whole_vectors_too() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", OTHER_ARCHS], env=environment, capture_output=True, text=True)
    expected = [f"{arch} True 0 {{16: 4}} 14.0" for arch in ("sm_120", "gfx90a", "gfx1100")]
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--arch", "sm90"), 'expected a name like "sm_90" or "gfx942", got \'sm90\''),
        (("--kernel", "sgd", "--kernel", "lion"), "no kernel has 'lion' in its name; there are adam fp32, "),
    ],
)
def test_an_unknown_architecture_or_kernel_is_refused_by_name(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_code_that_the_tools_cannot_read_is_refused_with_their_reason() -> None:
    unreadable = Compiled("sm_70", {"cubin": b"of a GPU that CUDA has dropped"}, {}, 0, 0, 0)
    with pytest.raises(ValueError, match=r"nvdisasm cannot read this architecture's code: .*fatal"):
        _ = unreadable.machine_code


@pytest.mark.usefixtures("interpreted")
def test_nothing_is_compiled_where_kernels_are_interpreted() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_update(Spec("adam", "float32", "float32", ("float32",) * 2), LaunchConfig(), "sm_90")


def test_a_table_has_a_line_for_each_kernel() -> None:
    lines = run("--arch", "sm_90", "--kernel", "accumulate").stdout.splitlines()
    assert lines[0].split()[:4] == ["kernel", "arch", "vector", "loads"]
    names = ["accumulate fp32", "accumulate fp32 bf16-grad"]
    assert [line.split("  ")[0] for line in lines[1:]] == names
    assert "4x16" in lines[1]
