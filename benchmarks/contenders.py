"""Who is measured: each contender is a constructor, and adding one is one line."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import Case, Precision
from benchmarks.workload import BETAS, LOSS_SCALE, LR, MAX_GRAD_NORM, Workload

COMPILED_CASES = ("1 x 20M", "GPT-2 124M")

Step = Callable[[], object]

TORCH_FUSED = "torch fused"

# Below this many elements `flatten=True` joins tensors.
N_SMALL = 8192


class UnsupportedError(Exception):
    """Why a contender does not take part in a case."""


def like_param(precision: Precision) -> float:
    """Bytes a parameter of two moments in the parameter's dtype."""
    return 2 * precision.param.itemsize


def as_asked(precision: Precision) -> float:
    """Bytes a parameter of two moments in the dtype that the case asks for."""
    return 2 * precision.state.itemsize


def in_fp32(precision: Precision) -> float:
    """Bytes a parameter of two moments in fp32."""
    return 8


def eight_bits(precision: Precision) -> float:
    """Bytes a parameter of two moments in 8 bits, without their scales."""
    return 2


@dataclass(frozen=True)
class Contender:
    """An optimizer to measure.

    Attributes:
        name: as on the command line and in the results.
        build: makes a step from a workload.
        module: what must be importable.
        state_nbytes: bytes a parameter of the moments it keeps.
        chain_grad_accesses: how often it reads or writes each gradient in a chain; torch's: unscale 2, norm 1,
            clip 2, update 1.
        native_grad_accesses: the same on the CPU, where it differs.
        tolerance: largest error of a parameter in learning rates a step.
        devices: types of devices that it works on; empty for all.
        mixed: whether the moments' dtype may differ from the parameter's.
        only: the only cases that it is worth its time in; empty for all.
        slow: measured after the others, and not in the quick set.
        verify: why it did not do what it is measured for; None if it did.
    """

    name: str
    build: Callable[[Workload], Step]
    module: str = "torch"
    state_nbytes: Callable[[Precision], float] = like_param
    chain_grad_accesses: int = 6
    native_grad_accesses: int | None = None
    tolerance: float = 1e-3
    devices: tuple[str, ...] = ()
    mixed: bool = True
    only: tuple[str, ...] = ()
    slow: bool = False
    verify: Callable[[Workload], str | None] = lambda workload: None

    def why_not(self, case: Case, precision: Precision, device: torch.device) -> str | None:
        """Why it is known not to take part in a case; None if it is worth a try."""
        # Triton's interpreter, for tests and dry runs, takes tensors of any device.
        interpreted = self.module == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if self.devices and device.type not in self.devices and not interpreted:
            return f"it works on {' and '.join(self.devices)} only"
        if not self.mixed and precision.state != precision.param:
            return "it keeps moments in the parameter's dtype only"
        if self.only and case.name not in self.only:
            return f"it compiles for minutes, which is done for {' and '.join(self.only)} only"
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == self.module.partition(".")[0]
            return f"{self.module} is not installed" if absent else f"{self.module}: {error}"
        return None

    def nbytes_per_param(self, case: Case, precision: Precision, device: torch.device) -> float:
        """Bytes that one step moves for a parameter."""
        grads = 1
        if case.chain:
            on_cpu = device.type == "cpu" and self.native_grad_accesses is not None
            grads = (self.native_grad_accesses if on_cpu else None) or self.chain_grad_accesses
        n_moments = 3 if case.amsgrad else 2
        nbytes = (2 + grads) * precision.param.itemsize + n_moments * self.state_nbytes(precision)
        return nbytes / 2 if case.changing else nbytes

    def nbytes_held(self, case: Case, precision: Precision) -> float:
        """Bytes of memory for a parameter, its old and its new gradient, and its moments."""
        n_moments = 3 if case.amsgrad else 2
        return 3 * precision.param.itemsize + n_moments / 2 * self.state_nbytes(precision)

    def tolerance_for(self, precision: Precision) -> float:
        """The tolerance, looser for moments of 16 bits."""
        narrow = self.state_nbytes(precision) < 8
        return max(self.tolerance, 0.05) if narrow else self.tolerance


def ours(**options: Any) -> Callable[[Workload], Step]:
    """Our Adam in PyTorch's form."""

    def build(workload: Workload) -> Step:
        from dragon.vm.torch.optim import Adam

        origin, asked = workload.origin, dict[str, Any]()
        if origin.precision.state != origin.precision.param:
            asked["state_dtype"] = origin.precision.state
        if origin.case.chain:
            asked |= {"max_grad_norm": MAX_GRAD_NORM, "skip_nonfinite": True}
        optimizer = Adam(
            workload.groups,
            LR,
            BETAS,
            origin.eps,
            amsgrad=origin.case.amsgrad,
            epsilon_hat=False,
            **(asked | options),
        )
        if origin.case.chain:
            optimizer.grad_scale = torch.full((1,), LOSS_SCALE, device=origin.device)  # type: ignore[attr-defined]  # as a GradScaler does
        workload.schedule(optimizer)
        return optimizer.step

    return build


def foreign(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Workload], Step]:
    """Another optimizer with torch's arguments, behind torch's chain where the case has one."""

    def build(workload: Workload) -> Step:
        amsgrad = {"amsgrad": True} if workload.origin.case.amsgrad else {}
        optimizer = make(workload.groups, lr=LR, betas=BETAS, eps=workload.origin.eps, **amsgrad, **options)
        workload.schedule(optimizer)
        return chained(optimizer, workload) if workload.origin.case.chain else optimizer.step

    return build


def imported(path: str, **options: Any) -> Callable[[Workload], Step]:
    """`foreign`, for a class that is imported only when it is built."""

    def build(workload: Workload) -> Step:
        module, _, name = path.rpartition(".")
        return foreign(getattr(importlib.import_module(module), name), **options)(workload)

    return build


def compiled(workload: Workload) -> Step:
    """Torch's Adam, its step compiled; its learning rate is a tensor, since a new number compiles again."""
    if workload.origin.case.chain:
        raise UnsupportedError("a GradScaler calls the optimizer's own step")
    device = workload.origin.device
    groups = [{**group, "lr": torch.tensor(group["lr"], device=device)} for group in workload.groups]
    optimizer = torch.optim.Adam(
        groups, betas=BETAS, eps=workload.origin.eps, foreach=True, capturable=device.type != "cpu"
    )
    workload.schedule(optimizer)
    step: Step = torch.compile(optimizer.step)
    return step


def chained(optimizer: torch.optim.Optimizer, workload: Workload) -> Step:
    """Unscale, clip by the global norm, check and step, with torch's means."""
    device = workload.origin.device.type
    scaler = torch.amp.GradScaler(device, init_scale=LOSS_SCALE, growth_interval=2**30)
    scaler.scale(torch.zeros((), device=device))  # makes the scale's tensor

    def step() -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(workload.params, MAX_GRAD_NORM)
        scaler.step(optimizer)
        scaler.update()

    return step


def is_flat(workload: Workload) -> str | None:
    """Whether small parameters of each group lie next to each other, with at most 16 elements of padding each."""
    for group in workload.groups:
        small = [param for param in group["params"] if 0 < param.numel() < N_SMALL]
        starts = [param.data_ptr() for param in small]
        nbytes = sum((param.numel() + 16) * param.element_size() for param in small)
        if max(starts, default=0) - min(starts, default=0) > nbytes:
            return "flatten=True had no effect"
    return None


_FLASH = "flashoptim.FlashAdam"

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(TORCH_FUSED, foreign(torch.optim.Adam, fused=True)),
        Contender("torch foreach", foreign(torch.optim.Adam, foreach=True)),
        Contender("torch for-loop", foreign(torch.optim.Adam, foreach=False), slow=True),
        Contender("torch compiled", compiled, only=COMPILED_CASES, slow=True),
        Contender(
            "ours triton",
            ours(backend="triton"),
            "triton",
            as_asked,
            chain_grad_accesses=2,
            devices=("cuda", "xpu"),
        ),
        # In a chain it reads gradients for the norm and for a copy that the operation scales, and divides them.
        Contender("ours native", ours(backend="native"), native_grad_accesses=4, devices=("cpu",), mixed=False),
        Contender("ours eager", ours(backend="eager"), state_nbytes=as_asked, chain_grad_accesses=2, slow=True),
        Contender(
            "ours flatten",
            ours(backend="native", flatten=True),
            native_grad_accesses=4,
            devices=("cpu",),
            mixed=False,
            verify=is_flat,
        ),
        # Its compensated sums, the default for bf16, make each step of a constant gradient shorter than the last:
        # 0.0010, 0.0007, 0.0005 at a learning rate of 0.001 (optimi 0.3.3).
        Contender("optimi", imported("optimi.Adam", kahan_sum=False), "optimi"),
        Contender("flashoptim", imported(_FLASH), "flashoptim", eight_bits, tolerance=0.2),
        Contender(
            "flashoptim unquantized",
            imported(_FLASH, quantize=False, master_weight_bits=None),
            "flashoptim",
            in_fp32,
        ),
        Contender("apex", imported("apex.optimizers.FusedAdam", adam_w_mode=False), "apex", in_fp32),
        Contender(
            "TransformerEngine",
            imported("transformer_engine.pytorch.optimizers.FusedAdam", adam_w_mode=False),
            "transformer_engine",
            in_fp32,
        ),
        Contender("bitsandbytes", imported("bitsandbytes.optim.Adam32bit"), "bitsandbytes", in_fp32),
        Contender(
            "bitsandbytes 8-bit",
            imported("bitsandbytes.optim.Adam8bit"),
            "bitsandbytes",
            eight_bits,
            tolerance=0.5,
        ),
        Contender(
            "torchao 8-bit",
            imported("torchao.optim.Adam8bit"),
            "torchao",
            eight_bits,
            tolerance=0.5,
            only=COMPILED_CASES,
            slow=True,
        ),
    )
}
