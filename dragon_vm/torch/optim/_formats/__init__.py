"""How a tensor is stored: plain, rounded, split from its master, or blockwise in 8 bits."""

from dragon.vm.torch.optim._formats.bits import square_root
from dragon.vm.torch.optim._formats.blockwise import SignedQ8, SquareQ8
from dragon.vm.torch.optim._formats.bound import SLACK, clamp_moment, moment_bound, rounded_bound
from dragon.vm.torch.optim._formats.format import BLOCK, Format, Part, nbytes
from dragon.vm.torch.optim._formats.philox import Rounding, random_words
from dragon.vm.torch.optim._formats.resolve import (
    MOMENTS,
    Storage,
    StorageOptions,
    blockwise_format,
    cannot_forget,
    check_options,
    is_blockwise,
    resolve,
)
from dragon.vm.torch.optim._formats.rounding import Plain, StochasticBfloat16, UpwardBfloat16
from dragon.vm.torch.optim._formats.split import Master, Split8, Split16

__all__ = [
    "BLOCK",
    "MOMENTS",
    "SLACK",
    "Format",
    "Master",
    "Part",
    "Plain",
    "Rounding",
    "SignedQ8",
    "Split8",
    "Split16",
    "SquareQ8",
    "StochasticBfloat16",
    "Storage",
    "StorageOptions",
    "UpwardBfloat16",
    "blockwise_format",
    "cannot_forget",
    "check_options",
    "clamp_moment",
    "is_blockwise",
    "moment_bound",
    "nbytes",
    "random_words",
    "resolve",
    "rounded_bound",
    "square_root",
]
