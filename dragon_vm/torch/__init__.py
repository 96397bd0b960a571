"""`torch` with Dragon's own Parameter and Optimizer layer: `from dragon.vm import torch`.

What is not defined here is PyTorch's own: names, submodules and `dir()`.
"""

from typing import TYPE_CHECKING

from dragon.vm.torch._mirror import install_finder, mirror

install_finder()

import torch as _torch  # noqa: E402  # the finder comes first, so that nothing below loads PyTorch's files twice

from dragon.vm.torch import creation, nn, optim, tensor_type  # noqa: E402  # as above
from dragon.vm.torch.nn.parameter import UninitializedParameter  # noqa: E402  # as above
from dragon.vm.torch.tensor_type import Tensor  # noqa: E402  # as above

if TYPE_CHECKING:
    from torch import *  # noqa: F403  # for editors and type checkers, which cannot follow `__getattr__`
else:
    globals().update(creation.FUNCTIONS)

_torch.serialization.add_safe_globals([Tensor, nn.Parameter, UninitializedParameter, tensor_type.rebuild])

__getattr__, __dir__ = mirror("torch", globals())
