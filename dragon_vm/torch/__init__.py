"""`torch` with Dragon's own Parameter and Optimizer layer: `from dragon.vm import torch`.

What is not defined here is PyTorch's own: names, submodules and `dir()`.
"""

from typing import TYPE_CHECKING

from dragon.vm.torch._mirror import install_finder, mirror

install_finder()

import torch as _torch  # noqa: E402  # the finder comes before everything that may import below this package

# "nn as nn": a type checker takes a plain import for private.
from dragon.vm.torch import _compiler  # noqa: E402  # as above
from dragon.vm.torch import creation as _creation  # noqa: E402  # as above
from dragon.vm.torch import nn as nn  # noqa: E402  # as above
from dragon.vm.torch import optim as optim  # noqa: E402  # as above
from dragon.vm.torch import tensor_type as _tensor_type  # noqa: E402  # as above
from dragon.vm.torch.nn import parameter as _parameter  # noqa: E402  # as above

if TYPE_CHECKING:
    # Editors and type checkers cannot follow `__getattr__`. They see PyTorch's own names and annotations.
    from torch import *  # noqa: F403  # all of PyTorch's names, on purpose
else:
    Tensor = _tensor_type.Tensor
    compile = _compiler.compile
    globals().update(_creation.FUNCTIONS)

# So that `torch.load` with `weights_only=True`, its default, reads what was saved from Dragon tensors.
_torch.serialization.add_safe_globals(
    [_tensor_type.Tensor, _parameter.Parameter, _parameter.UninitializedParameter, _tensor_type.rebuild]
)

__getattr__, __dir__ = mirror("torch", globals())
