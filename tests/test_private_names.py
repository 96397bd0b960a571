"""What the optimizers use of PyTorch that is private: few names, each with a reason."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

OPTIM = Path(__file__).parents[1] / "dragon_vm" / "torch" / "optim"
SOURCES = [path.read_text(encoding="utf-8") for path in sorted(OPTIM.rglob("*.py"))]

# All that is private in torch and used by the optimizers; a name that ends with a star stands for a family.
PRIVATE_TORCH_NAMES = {
    "_disabled_torch_function_impl": "switches __torch_function__ off, such that no interrupt leaves it off",
    "_set_grad_enabled": "the same for gradients",
    "TensorGuards": "compares layouts in C++",
    "_disable_dynamo": "keeps torch.compile out, as PyTorch's optimizers do",
    "_is_profiler_enabled": "tells whether anybody wants to see a step's range",
    "flatten_dense_tensors": "joins small gradients for one norm",
    "_foreach_*": "one operation for many tensors",
    "_fused_*": "PyTorch's fused CPU operations",
}
MAX_PRIVATE_TORCH_NAMES = 8

# What PyTorch's tensors and distributed modules keep under a private name, and nothing public tells.
PRIVATE_TORCH_ATTRIBUTES = {
    "_version": "counts the writes to a tensor, as autograd does",
    "_local_tensor": "a DTensor's shard; to_local() is a function of autograd",
    "_spec": "a DTensor's placements, as one object",
    "_fsdp_flattened": "marks the parameters of FSDP1",
    "_join_config": "whether DDP is inside of Join",
    "_unsharded_param": "the whole parameter that FSDP2 left in memory",
    "_partial_reduce_output": "what FSDP2 has not reduced among replicas",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group": "whose it is",
    "torch.distributed.fsdp._flat_param": "which parameters FSDP1 splits",
    "torch.distributed._functional_collectives": "tensors that wait for a collective",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_torch_names(source: str) -> Iterator[str]:
    """Yield what a module uses of torch that has a private name, or that stands in a private module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            parts = (node.module or "").split(".")
            yield from (alias.name for alias in node.names if any(map(is_private, [*parts, alias.name])))
        elif isinstance(node, ast.Import):
            yield from (
                alias.name
                for alias in node.names
                if alias.name.split(".")[0] == "torch" and any(map(is_private, alias.name.split(".")))
            )
        elif isinstance(node, ast.Attribute):
            chain = ast.unparse(node).split(".")
            # The whole chain only: its parts are attributes, too.
            if chain[0] == "torch" and (is_private(chain[-1]) or is_private(chain[-2])):
                yield chain[-1]


def listed(name: str) -> str:
    """The name as the list has it: of a family, if it belongs to one."""
    families = [family for family in PRIVATE_TORCH_NAMES if family.endswith("*") and name.startswith(family[:-1])]
    return families[0] if families else name


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from torch._C import _f", ["_f"]),
        ("from torch._C._dynamo.guards import TensorGuards", ["TensorGuards"]),
        ("import torch._inductor", ["torch._inductor"]),
        ("torch._foreach_add_(a, b)", ["_foreach_add_"]),
        ("torch._C._nn.f(a)", ["f", "_nn", "_C"]),
        ("from torch import Tensor\ntorch.nn.Parameter.__init__", []),
    ],
)
def test_every_use_of_a_private_name_is_seen(source: str, names: list[str]) -> None:
    assert list(private_torch_names(source)) == names


def test_private_names_of_torch_are_few_and_listed() -> None:
    used = {listed(name) for source in SOURCES for name in private_torch_names(source)}
    # Modules on the way to a name, of which the name is listed.
    used -= {"_C", "_nn", "_dynamo"}
    assert used == set(PRIVATE_TORCH_NAMES)
    assert len(PRIVATE_TORCH_NAMES) <= MAX_PRIVATE_TORCH_NAMES


LOOK_UPS = {"getattr", "hasattr", "attrgetter", "get", "instances"}


def private_torch_attributes(source: str) -> Iterator[str]:
    """Yield private names that a module looks up by their text, and those of tensors that it writes out."""
    of_tensors = {*dir(torch.Tensor), *getattr(DTensor, "__annotations__", ()), *dir(DTensor)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in LOOK_UPS:
            texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            names = [text for text in texts if isinstance(text, str)]
            yield from (name for name in names if re.fullmatch(r"_[a-z]\w*|torch\.[\w.]*\._\w+", name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr in of_tensors:
            yield from () if ast.unparse(node.value) == "self" else (node.attr,)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("attrgetter('_version')", ["_version"]),
        ("getattr(param, '_fsdp_flattened', False)", ["_fsdp_flattened"]),
        ("sys.modules.get('torch.distributed._tensor')", ["torch.distributed._tensor"]),
        ("shard.to(param._local_tensor)", ["_local_tensor"]),
        ("group.get('lr'), self._version", []),
    ],
)
def test_every_use_of_a_private_attribute_is_seen(source: str, names: list[str]) -> None:
    assert list(private_torch_attributes(source)) == names


def test_private_attributes_of_torch_are_listed() -> None:
    used = {name for source in SOURCES for name in private_torch_attributes(source)}
    assert used == set(PRIVATE_TORCH_ATTRIBUTES)
