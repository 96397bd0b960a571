"""The generated code, for GPUs that are not here: compiled in a process without TRITON_INTERPRET."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dragon.kernels.config import LaunchConfig
from dragon.kernels.inspect import ADVANCES, ARCHS, NORMS, UPDATES, compile_update
from dragon.kernels.spec import Spec

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
}

I32_ARITHMETIC = re.compile(r"arith\.(?:add|sub|mul|shl|divs|rems)\w* .*: (?:tensor<[\dx]+)?i32>? loc")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "dragon.kernels.inspect", *arguments]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_is_all_vector_without_spills_and_takes_only_pointers(arch: str, tmp_path: Path) -> None:
    done = run("--arch", arch, "--json", "--dump", str(tmp_path))
    assert done.returncode == 0, done.stderr
    reports = {report["kernel"]: report for report in json.loads(done.stdout)}
    assert reports.keys() == {*UPDATES, *NORMS, *ADVANCES}

    narrow = {name: r["paths"] for name, r in reports.items() if r["paths"] and not r["is_vectorized"]}
    assert narrow == {}, "accesses of less than 16 bytes on the vector path"
    assert {name: r["spilled_nbytes"] for name, r in reports.items() if r["spilled_nbytes"]} == {}
    assert {name: r["nbytes_per_element"] for name, r in reports.items() if name in UPDATES} == FLOOR
    arguments = {kind for r in reports.values() for kind in r["arguments"].values()}
    assert {kind for kind in arguments if not kind.startswith("!tt.ptr<")} == set()

    for name in {*UPDATES, *NORMS}:
        assert reports[name]["paths"]["tail"]["loads"], f"{name}: no tail was recognised"
        assert reports[name]["paths"]["misaligned"]["loads"], f"{name}: no misaligned path was recognised"

    dumped = list(tmp_path.glob("*.ttir"))
    assert len(dumped) == len(reports)
    for path in dumped:
        assert I32_ARITHMETIC.findall(path.read_text()) == [], f"{path.name}: an offset of 32 bits may wrap around"


def test_the_search_for_narrow_offsets_finds_one() -> None:
    assert I32_ARITHMETIC.search("%1 = arith.muli %0, %c : i32 loc(#loc1)")
    assert I32_ARITHMETIC.search("%1 = arith.addi %0, %c : tensor<128xi32> loc(#loc1)")
    assert not I32_ARITHMETIC.search("%1 = arith.addi %0, %c : tensor<128xi64> loc(#loc1)")


CANDIDATES = """
from dragon.kernels.config import LaunchConfig
from dragon.kernels.inspect import UPDATES, compile_update
whole = compile_update(UPDATES["adam fp32"], LaunchConfig(512, eviction="evict_first"), "sm_90")
persistent = compile_update(UPDATES["adam bf16"], LaunchConfig(programs_per_processor=2), "sm_90")
narrow = compile_update(UPDATES["adam bf16"], LaunchConfig(512), "sm_90")
huge = compile_update(UPDATES["adam fp32"], LaunchConfig(16384), "sm_90")
print(whole.is_vectorized, persistent.is_vectorized, narrow.is_vectorized, huge.spilled_nbytes > 0)
print(whole.elements, whole.nbytes_per_element, narrow.paths["vector"].loads)
"""


def test_a_candidate_configuration_is_judged_without_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CANDIDATES], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["True True False True", "4.0 28.0 {8: 4}"], done.stderr


def test_an_unknown_architecture_is_refused_by_name() -> None:
    done = run("--arch", "sm90")
    assert done.returncode == 2
    assert 'expected a name like "sm_90" or "gfx942", got \'sm90\'' in done.stderr


@pytest.mark.usefixtures("interpreted")
def test_nothing_is_compiled_where_kernels_are_interpreted() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_update(Spec("adam", "float32", "float32", ("float32",) * 2), LaunchConfig(), "sm_90")


def test_a_table_has_a_line_for_each_kernel() -> None:
    lines = run("--arch", "sm_90", "--kernel", "sgd fp32").stdout.splitlines()
    assert lines[0].split()[:4] == ["kernel", "arch", "vector", "loads"]
    assert [line.split("  ")[0] for line in lines[1:]] == ["sgd fp32", "sgd fp32 momentum"]
    assert "4x16" in lines[1]
    assert len(lines) == 3
