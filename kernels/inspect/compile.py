"""Compile a kernel for a named GPU on a machine that has none, as a launch on that GPU would compile it."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend

from dragon.kernels.archs import check_arch, compute_capability, warp_size

# What the pointers of every kernel point to. A kernel argument that is neither here nor a constexpr is refused.
POINTER_TYPES = {
    "counts_ptr": "*i64",
    "chunks_ptr": "*i32",
    "spans_ptr": "*i32",
    "tensors_ptr": "*i64",
    "grads_ptr": "*i64",
    "sources_ptr": "*i64",
    "groups_ptr": "*fp64",
    "scalars_ptr": "*fp64",
    "partials_ptr": "*fp64",
    "status_ptr": "*fp64",
    "grad_scale_ptr": "*fp32",
    "found_inf_ptr": "*fp32",
}

# What a launch knows of a pointer to a table: "D" a multiple of 16 bytes, "S" into less than 2 GiB (ROCm only).
SPECIALIZATION = "DS"


class Compiled(NamedTuple):
    """A kernel as machine code.

    Attributes:
        arch: as in "sm_90" or "gfx942".
        asm: by stage, text ("ttir", "ptx", "amdgcn") or bytes ("cubin", "hsaco").
        arguments: types by name of what the compiled kernel takes at run time.
        registers: vector registers a thread.
        spilled_nbytes: local memory a thread, which these kernels use for spilled registers only.
        shared_nbytes: shared memory a program.
    """

    arch: str
    asm: Mapping[str, str | bytes]
    arguments: Mapping[str, str]
    registers: int
    spilled_nbytes: int
    shared_nbytes: int

    @property
    def assembly(self) -> str:
        """The text of the last stage that has one: PTX or AMD's."""
        return str(self.asm["amdgcn" if "amdgcn" in self.asm else "ptx"])

    @property
    def machine_code(self) -> str:
        """NVIDIA's machine code (SASS) as text with source lines, in the order of issue; empty for AMD."""
        if "cubin" not in self.asm:
            return ""
        return _run_on_cubin(self.asm["cubin"], knobs.nvidia.nvdisasm.path, "-g", "-c", "-ndf")


def _target(arch: str) -> GPUTarget:
    capability = compute_capability(check_arch(arch))
    if capability is None:
        return GPUTarget("hip", arch, warp_size(arch))
    return GPUTarget("cuda", capability, warp_size(arch))


@contextmanager
def scratch_cache() -> Iterator[None]:
    """Keep compiled kernels in a folder that goes away, unless TRITON_CACHE_DIR names one."""
    with tempfile.TemporaryDirectory(prefix="dragon-kernels-") as folder, knobs.cache.scope():
        if "TRITON_CACHE_DIR" not in os.environ:
            knobs.cache.dir = folder
        yield


def _arguments(ttir: str) -> dict[str, str]:
    """Names and types of the compiled kernel's arguments, from its first stage."""
    signature = re.search(r"tt\.func public @\w+\((.*)\) attributes", ttir)
    if signature is None:
        raise RuntimeError("no public function in the kernel's TTIR")
    return dict(re.findall(r"%(\w+): ([^\s,)]+)", signature[1]))


def _integer(name: str, text: str) -> int:
    found = re.search(rf"{re.escape(name)}:\s*(\d+)", text)
    if found is None:
        raise RuntimeError(f"no {name} in:\n{text[-2000:]}")
    return int(found[1])


def _run_on_cubin(cubin: str | bytes, *command: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin if isinstance(cubin, bytes) else cubin.encode())
        ended = subprocess.run([*command, str(path)], capture_output=True, text=True)
    if ended.returncode:
        # Those of triton's package read no code for GPUs that CUDA has dropped.
        raise ValueError(f"{Path(command[0]).name} cannot read this architecture's code: {ended.stderr.strip()}")
    return ended.stdout


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, as the machine code states them."""
    usage = _run_on_cubin(cubin, knobs.nvidia.cuobjdump.path, "-res-usage")
    return _integer("REG", usage), _integer("STACK", usage) + _integer("LOCAL", usage)


def _rocm_resources(assembly: str) -> tuple[int, int]:
    return _integer(".vgpr_count", assembly), _integer(".private_segment_fixed_size", assembly)


def compile_kernel(kernel: Any, constants: Mapping[str, Any], options: Mapping[str, Any], arch: str) -> Compiled:
    """Compile a kernel ahead of time.

    Args:
        kernel: a `triton.jit` function of pointers and constexprs.
        constants: values of its constexprs.
        options: options of the launch, such as `num_warps`.
        arch: as in "sm_90" or "gfx942".

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where kernels are Python and there is nothing to compile.
        TypeError: the kernel has an argument that is neither a known pointer nor a constexpr.
        ValueError: for an unknown architecture.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: kernels can only be compiled in a process without it")
    target = _target(arch)
    names = kernel.arg_names
    unknown = [name for name in names if name not in constants and name not in POINTER_TYPES]
    if unknown:
        raise TypeError(f"{kernel.__name__}: {unknown} are neither constants nor pointers that it may take")
    attributes = make_backend(target).parse_attr(SPECIALIZATION)
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name in constants else POINTER_TYPES[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # Constants are listed too, as triton's own launcher does: its cache then knows what is compiled here.
        attrs={(i,): [] if name in constants else attributes for i, name in enumerate(names)},
    )
    built = triton.compile(source, target=target, options=dict(options))
    registers, spilled = (
        _cuda_resources(built.asm["cubin"]) if target.backend == "cuda" else _rocm_resources(built.asm["amdgcn"])
    )
    asm = dict(built.asm)
    return Compiled(arch, asm, _arguments(str(asm["ttir"])), registers, spilled, built.metadata.shared)
