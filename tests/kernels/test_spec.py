import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys

import pytest

from dragon.kernels import LaunchConfig, Spec, default_config
from dragon.kernels.archs import ARCHS, arch_name, check_arch, compute_capability, warp_size

ADAM = Spec("adam", "float32", "bfloat16", ("float32", "float32"))
RECORDS = [ADAM, LaunchConfig(512, eviction="evict_first")]


@pytest.mark.parametrize("record", RECORDS, ids=["spec", "config"])
def test_a_constant_is_a_record_that_json_takes(record):
    values = dataclasses.asdict(record)
    same = type(record)(**values)
    assert same == record
    assert hash(same) == hash(record)
    assert str(same) == str(record) == repr(record) == f"{record}"
    assert all(f"{name}={value!r}" in str(record) for name, value in values.items())
    assert json.loads(json.dumps(record)) == type(record).__name__
    assert pickle.loads(pickle.dumps(record)) == copy.deepcopy(record) == record


def test_records_that_differ_in_a_field_are_different_constants():
    changes = {"algorithm": "sgd", "param": "bfloat16", "grad": "float32", "states": (), "average": "float32"}
    others = [dataclasses.replace(ADAM, **{name: value}) for name, value in changes.items()]
    others.append(dataclasses.replace(ADAM, zero_grad=True))
    assert len({ADAM, *others}) == len({str(spec) for spec in (ADAM, *others)}) == 7


# A launch as triton makes it, up to the machine code, on a GPU that is not here. The hook is called for each code
# that a process has not had yet, also where the cache on the disk has it.
COMPILATIONS = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor
from dragon.kernels import LaunchConfig, Spec, launch
from dragon.kernels.update import update_kernel

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

def compile(spec, config=LaunchConfig(), grad_scale=None):
    pointers = [MockTensor(dtype) for dtype in (tl.int32, tl.int64, tl.int64, tl.float64)] + [grad_scale]
    constants = {**launch.update_constants(spec, config), **launch.update_options(config)}
    update_kernel.warmup(*pointers, grid=(1,), **constants)
    return len(compiled)

triton.runtime.driver.set_active(Driver())
compiled = []
triton.knobs.runtime.jit_cache_hook = lambda **_: compiled.append(1) and None
states = ("float32", "float32")
print(compile(Spec("adam", "float32", "float32", states)))
print(compile(Spec("adam", "float32", "float32", states)))
print(compile(Spec("accumulate", "float32", "float32")))
print(compile(Spec("accumulate", "float32", "float32"), LaunchConfig(eviction="evict_first")))
print(compile(Spec("adam", "float32", "float32", states)))
print(compile(Spec("adam", "float32", "float32", states), grad_scale=MockTensor(tl.float32)))
print(compile(Spec("adam", "float32", "float32", states), grad_scale=MockTensor(tl.float32)))
"""


def test_a_launch_compiles_once_for_a_spec_beside_a_compile_hook():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILATIONS], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1", "2", "3", "3", "4", "4"], done.stderr


def test_names_of_architectures_have_one_spelling():
    assert [arch_name(arch) for arch in (90, "90", "sm_90", "gfx942")] == ["sm_90", "sm_90", "sm_90", "gfx942"]
    assert [compute_capability(arch) for arch in ARCHS] == [80, 90, 100, None]
    assert [warp_size(arch) for arch in (*ARCHS, "gfx1100")] == [32, 32, 32, 64, 32]
    assert [check_arch(arch) for arch in ARCHS] == list(ARCHS)
    assert default_config("90") == default_config("sm_90") == LaunchConfig()
    assert {default_config(arch).chunk for arch in ("gfx90a", "gfx942", "gfx950")} == {2048}
    assert default_config("gfx1100") == LaunchConfig()
    assert default_config("cpu").chunk == 4096
    blocks = Spec("adam", "split8", "bfloat16", ("q8_signed", "q8_square"))
    assert default_config("90", blocks) == LaunchConfig(chunk=512, n_warps=2)
    assert default_config("90", Spec("adam", "split16", "bfloat16", ("float32",) * 2)) == LaunchConfig()


@pytest.mark.parametrize("arch", ["90", "sm90", "gfx", "", "sm_90a "])
def test_other_spellings_are_refused(arch):
    with pytest.raises(ValueError, match='expected a name like "sm_90" or "gfx942", got '):
        check_arch(arch)
