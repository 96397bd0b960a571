"""`dragon.vm.torch.nn`: PyTorch's modules with Dragon's parameters, wherever these come from."""

import abc
import copy
import io
import pickle

import pytest
import torch as real

from dragon.vm import torch
from dragon.vm.torch.nn.utils import prune

MODULES = sorted(
    name
    for name, value in vars(real.nn).items()
    if isinstance(value, type) and issubclass(value, real.nn.Module) and "__deprecated__" not in vars(value)
)

WITH_PARAMETERS = {
    "Linear": (3, 4), "Bilinear": (2, 3, 4), "Conv1d": (2, 3, 2), "Conv2d": (2, 3, 2), "Conv3d": (2, 3, 2),
    "ConvTranspose1d": (2, 3, 2), "ConvTranspose2d": (2, 3, 2), "ConvTranspose3d": (2, 3, 2), "BatchNorm1d": (3,),
    "BatchNorm2d": (3,), "BatchNorm3d": (3,), "SyncBatchNorm": (3,), "LayerNorm": (3,), "RMSNorm": (3,),
    "GroupNorm": (1, 3), "Embedding": (3, 4), "EmbeddingBag": (3, 4), "RNN": (3, 4), "LSTM": (3, 4, 2),
    "GRU": (3, 4), "RNNCell": (3, 4), "LSTMCell": (3, 4), "GRUCell": (3, 4), "PReLU": (),
    "MultiheadAttention": (4, 2),
    "AdaptiveLogSoftmaxWithLoss": (16, 10, [2, 5]),
    "TransformerEncoderLayer": (4, 2, 8), "TransformerDecoderLayer": (4, 2, 8),
}  # fmt: skip  # a line a call


def types(module):
    return {type(parameter) for parameter in module.parameters()}


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("name", MODULES)
def test_every_module_class_has_one_twin_that_is_pytorchs_subclass(name):
    twin, class_ = getattr(torch.nn, name), getattr(real.nn, name)

    assert getattr(torch.nn, name) is twin
    assert twin.__mro__.index(class_) > 0
    assert issubclass(class_, twin)
    assert pickle.loads(pickle.dumps(twin)) is twin
    assert (twin.__name__, twin.__doc__) == (class_.__name__, class_.__doc__) or name == "Module"


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_parameters_are_dragons_with_pytorchs_values(name):
    real.manual_seed(0)
    plain = getattr(real.nn, name)(*WITH_PARAMETERS[name])
    real.manual_seed(0)
    module = getattr(torch.nn, name)(*WITH_PARAMETERS[name])

    assert types(module) == {torch.nn.Parameter}
    assert types(plain) == {real.nn.Parameter}
    assert isinstance(module, getattr(real.nn, name))
    assert repr(module) == repr(plain)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key].as_subclass(real.Tensor), value, rtol=0, atol=0)


def test_plain_modules_are_instances_of_twins_but_not_of_users_classes():
    class Mine(torch.nn.Linear):
        pass

    assert isinstance(real.nn.Linear(1, 1), torch.nn.Linear)
    assert isinstance(real.nn.Linear(1, 1), torch.nn.Module)
    assert not isinstance(real.nn.ReLU(), torch.nn.Linear)
    assert not isinstance(real.nn.Linear(1, 1), Mine)
    assert types(Mine(1, 1)) == {torch.nn.Parameter}


def test_modules_that_pytorch_builds_inside_are_twins_too():
    module = torch.nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    assert types(module) == {torch.nn.Parameter}
    assert type(module.encoder.layers[0].linear1) is torch.nn.Linear
    module(torch.ones(1, 2, 8), torch.ones(1, 3, 8)).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_modules_that_are_handed_in_keep_what_they_are():
    plain = real.nn.Linear(2, 2)

    chain = torch.nn.Sequential(plain, torch.nn.ReLU(), torch.nn.Linear(2, 2))
    listed = torch.nn.ModuleList(module for module in [plain])
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1, plain)

    assert chain[0] is listed[0] is encoder.norm is plain
    assert types(plain) == {real.nn.Parameter}
    assert types(chain[2]) == types(encoder.layers) == {torch.nn.Parameter}


def test_a_parameter_given_to_a_dragon_module_becomes_dragons_in_place():
    module, plain = torch.nn.Linear(2, 2), real.nn.Parameter(real.ones(2, 2))

    module.weight = plain
    module.register_parameter("other", real.nn.Parameter(real.ones(1)))
    module.register_parameter("none", None)

    assert module.weight is plain
    assert types(module) == {torch.nn.Parameter}
    for factor in (2, 3):
        (plain * factor).backward()
    assert plain.grad.tolist() == [[3, 3], [3, 3]]


class Net(torch.nn.Module, abc.ABC):
    def __init__(self, backbone):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.backbone = backbone
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))

    def forward(self, x):
        x = self.backbone(x)
        for layer in self.layers:
            x += layer(x) * self.scale
        return x


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_a_users_network_survives_copies_with_plain_and_dragon_parameters_as_they_are(duplicate):
    net = duplicate(Net(real.nn.Linear(3, 3)))

    for _ in range(2):
        net(torch.ones(2, 3)).backward()

    assert types(net.layers) == {type(net.scale)} == {torch.nn.Parameter}
    assert types(net.backbone) == {real.nn.Parameter}
    accumulated, overwritten = net.backbone.bias.grad.clone(), net.scale.grad.clone()
    net(torch.ones(2, 3)).backward()
    torch.testing.assert_close(net.scale.grad, overwritten)
    torch.testing.assert_close(net.backbone.bias.grad, accumulated * 1.5)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_loading_a_state_dict_keeps_dragon_parameters(assign, plain):
    source = (real if plain else torch).nn.Linear(2, 2)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    module = torch.nn.Linear(2, 2)

    module.load_state_dict(torch.load(buffer), assign=assign)

    assert types(module) == {torch.nn.Parameter}
    assert module.weight.tolist() == source.weight.tolist()
    assert module.weight.requires_grad


@pytest.mark.parametrize("swap", [False, True])
def test_moving_a_module_keeps_dragon_parameters(swap):
    module = torch.nn.Linear(2, 2)
    real.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for moved in (module.half(), module.to(torch.float64), module.to("meta"), module.to_empty(device="cpu")):
            assert moved is module
            assert types(module) == {torch.nn.Parameter}
    finally:
        real.__future__.set_swap_module_params_on_conversion(False)
    for factor in (2, 3):
        (module.bias * factor).backward()
    assert module.bias.grad.tolist() == [3, 3]


def test_a_lazy_module_becomes_the_twin_with_the_first_batch():
    module = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.LazyBatchNorm1d())
    assert types(module) == {torch.nn.UninitializedParameter}
    copied, unpickled = copy.deepcopy(module[0]), pickled(module[0])

    for lazy in (module, copied, unpickled):
        for _ in range(2):
            lazy(torch.ones(4, 2)).backward()
        assert types(lazy) == {torch.nn.Parameter}
    assert type(module[0]) is torch.nn.Linear
    assert type(module[1]) is torch.nn.BatchNorm1d
    assert copied.bias.grad.tolist() == [4, 4, 4]


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations_keep_dragon_parameters(norm):
    module = getattr(torch.nn.utils.parametrizations, norm)(torch.nn.Linear(3, 3))

    module(torch.ones(1, 3)).backward()
    assert isinstance(module, torch.nn.Linear)
    assert types(module) == types(copy.deepcopy(module)) == {torch.nn.Parameter}
    torch.nn.utils.parametrize.remove_parametrizations(module, "weight")
    assert types(module) == {torch.nn.Parameter}


def test_pruning_and_functional_calls_work():
    module = torch.nn.Linear(3, 3)
    prune.l1_unstructured(module, "weight", amount=3)
    doubled = {name: value * 2 for name, value in module.named_parameters()}

    y = torch.func.functional_call(module, doubled, (torch.ones(1, 3),))
    y.backward()

    assert type(y) is torch.Tensor
    assert types(module) == {torch.nn.Parameter}
    assert module.bias.grad.tolist() == [2, 2, 2]


def test_symbolic_tracing_goes_into_a_twin_and_computes_the_same():
    network, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()), torch.randn(2, 3)
    traced = real.fx.symbolic_trace(network)
    assert "call_module" not in {node.op for node in traced.graph.nodes}
    assert real.equal(traced(x), network(x))


def test_parameter_containers_hold_dragon_parameters():
    listed = torch.nn.ParameterList([torch.ones(2), real.ones(2)])
    listed.append(real.ones(3))
    named = torch.nn.ParameterDict({"a": torch.ones(2), "b": real.ones(2)})

    assert types(listed) == types(named) == {torch.nn.Parameter}


def test_the_parameter_module_is_pytorchs_with_dragons_classes():
    from dragon.vm.torch.nn import parameter

    assert parameter.Parameter is torch.nn.Parameter
    assert parameter.is_lazy is real.nn.parameter.is_lazy
    assert torch.nn.Parameter().numel() == 0
