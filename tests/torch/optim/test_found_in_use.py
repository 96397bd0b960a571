"""What real programs do to optimizers beside training."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam

from .support import BACKENDS, home

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def one(backend: str = "native") -> Any:
    param = torch.nn.Parameter(torch.zeros(3, device=home(backend)))
    param.grad = torch.ones_like(param)
    return param


@each_backend
@pytest.mark.parametrize("yes", [1, np.True_])
def test_a_flag_may_be_anything_that_is_true(backend: str, yes: Any) -> None:
    flags = {Adam: ("amsgrad", "maximize", "decoupled_weight_decay", "epsilon_hat"), SGD: ("nesterov", "maximize")}
    for algorithm, names in flags.items():
        options = {"momentum": 0.9} if algorithm is SGD else {}
        params = [one(backend), one(backend)]
        for param, value in zip(params, (yes, True), strict=True):
            algorithm([param], lr=0.1, backend=backend, **options, **dict.fromkeys(names, value)).step()
        assert torch.equal(*params)


@each_backend
@pytest.mark.parametrize("algorithm", [Adam, SGD])
def test_a_property_grad_of_a_subclass_set_after_the_first_step_is_read(algorithm: Any, backend: str) -> None:
    class Late(torch.nn.Parameter):
        pass

    param, plain = Late(torch.zeros(3, device=home(backend))), one(backend)
    optimizers = [algorithm([p], lr=0.1, backend=backend) for p in (param, plain)]
    param.grad = torch.ones(3, device=home(backend))
    for optimizer in optimizers:
        optimizer.step()
    Late.grad = property(lambda self: torch.full((3,), -3.0, device=home(backend)))  # type: ignore[assignment]  # as users do
    plain.grad = torch.full((3,), -3.0, device=home(backend))
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(param.as_subclass(torch.Tensor), plain)
    assert (plain != 0).all()


@each_backend
@pytest.mark.parametrize("first", [True, False])
def test_foreign_string_keys_of_the_state_are_kept_and_saved(first: bool, backend: str) -> None:
    param = one(backend)
    optimizer = Adam([param], backend=backend)
    if not first:
        optimizer.step()
    optimizer.state["global_step"] = 7  # type: ignore[index]  # as users do
    before = param.detach().clone()
    for _ in range(2):
        optimizer.step()
    assert not torch.equal(before, param)
    saved = optimizer.state_dict()
    assert saved["state"]["global_step"] == 7
    other = Adam([one(backend)], backend=backend)
    other.load_state_dict(saved)
    assert other.state["global_step"] == 7  # type: ignore[index]  # as above
    other.step()


@each_backend
@pytest.mark.parametrize("algorithm", [Adam, SGD])
@pytest.mark.parametrize("kind", [np.array, np.float32, np.float64, torch.tensor])
def test_a_rate_of_one_number_is_read_at_each_step_whatever_holds_it(
    kind: Any, algorithm: Any, backend: str
) -> None:
    param, plain = one(backend), one(backend)
    optimizer, expected = (algorithm([p], lr=0.5, backend=backend) for p in (param, plain))
    held = optimizer.param_groups[0]["lr"] = kind(0.5)
    for rate in (0.5, 0.25, 0.125):
        if kind in (np.array, torch.tensor):
            held[...] = rate
        else:
            optimizer.param_groups[0]["lr"] = kind(rate)
        expected.param_groups[0]["lr"] = rate
        optimizer.step()
        expected.step()
    assert torch.equal(param, plain)


@each_backend
def test_sgd_takes_a_tensor_rate_with_foreach_as_torch_does(backend: str) -> None:
    param = one(backend)
    SGD([param], lr=torch.tensor(0.5), foreach=True, backend=backend).step()
    assert (param == -0.5).all()
    with pytest.raises(ValueError, match="lr as a Tensor is not supported for capturable=False and foreach=True"):
        Adam([param], lr=torch.tensor(0.5), foreach=True, backend=backend)


@pytest.mark.parametrize("algorithm", [Adam, SGD])
def test_an_optimizer_may_be_built_within_a_compiled_function(algorithm: Any) -> None:
    param = one()

    @torch.compile(backend="eager")
    def build_and_step() -> Any:
        optimizer = algorithm([param], lr=0.5)
        optimizer.step()
        return optimizer

    try:
        optimizer = build_and_step()
    finally:
        torch.compiler.reset()
    expected = one()
    algorithm([expected], lr=0.5).step()
    assert torch.equal(param, expected)
    assert isinstance(optimizer, algorithm)
    optimizer.step()


def test_a_counter_in_other_memory_counts_on():
    elsewhere = [torch.tensor(5.0) for _ in range(50)]  # at lower addresses
    for counter in elsewhere:
        param = torch.nn.Parameter(torch.ones(5))
        optimizer = Adam([param], lr=0.1, backend="native")
        for step in range(4):
            param.grad = torch.ones(5)
            if step == 2:
                optimizer.state[param]["step"].data = counter
            optimizer.step()
        assert float(optimizer.state[param]["step"]) == 7


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("begin", [lambda s: s.update(momentum_buffer=None), lambda s: s.pop("momentum_buffer")])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_a_buffer_that_was_taken_away_begins_anew(begin, dampening, backend):
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    options = {"lr": 0.1, "momentum": 0.9, "dampening": dampening}
    ours, theirs = SGD(params[:1], backend=backend, **options), torch.optim.SGD(params[1:], **options)
    for step in range(5):
        for param, optimizer in zip(params, (ours, theirs), strict=True):
            param.grad = torch.full((5,), 1.0 + step)
            if step == 3:
                begin(optimizer.state[param])
            optimizer.step()
    torch.testing.assert_close(*params)


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("betas", [(1.0, 0.999), (0.9, 1.0), (-0.1, 0.9), (0.9, float("nan"))])
def test_betas_out_of_range_are_refused_before_anything_is_counted(betas, backend):
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = Adam([param], lr=0.1, backend=backend)
    param.grad = torch.ones(5)
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["betas"] = betas
    for _ in range(2):
        with pytest.raises(ValueError, match="Invalid beta parameter at index"):
            optimizer.step()
    assert torch.equal(param, before)
    assert float(optimizer.state[param]["step"]) == 1


@each_backend
def test_the_norm_is_that_of_the_last_step_that_needed_it(backend):
    param = one(backend)
    optimizer = SGD([param], lr=0.1, backend=backend)
    optimizer.step()
    assert optimizer.grad_norm is None
    norms = []
    for wanted in (1.0, 1.0, 0.0):
        optimizer = SGD([param], lr=0.1, backend=backend, max_grad_norm=wanted)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert norms[0] == norms[1] == pytest.approx(3**0.5)
    assert norms[2] is None


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize(
    "transpose",
    [
        lambda state: state.t_(),
        lambda state: state.transpose_(0, 1),
        lambda state: setattr(state, "data", state.data.t()),
        lambda state: state.as_strided_((2, 2), (1, 2)),
    ],
)
def test_a_state_whose_layout_is_changed_in_place_is_walked_in_the_new_one(transpose, backend):
    def run(cls, **options):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.zeros(2, 2))
        optimizer = cls([param], lr=0.1, **options)
        for step in range(4):
            if step == 2:
                for key in ("exp_avg", "exp_avg_sq"):
                    transpose(optimizer.state[param][key])
            param.grad = torch.randn(2, 2, generator=generator)
            optimizer.step()
        return param.detach()

    torch.testing.assert_close(run(Adam, backend=backend), run(torch.optim.Adam))
    torch.testing.assert_close(run(Adam, backend=backend, flatten=True), run(torch.optim.Adam))


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_parameter_of_a_flat_buffer_that_is_transposed_in_place_leaves_it(backend):
    def run(cls, **options):
        params = [torch.nn.Parameter(torch.arange(4.0).view(2, 2)), torch.nn.Parameter(torch.zeros(2))]
        optimizer = cls(params, lr=1.0, **options)
        params[0].data = params[0].data.t()
        params[0].grad, params[1].grad = torch.tensor([[0.0, 10.0], [0.0, 0.0]]), torch.zeros(2)
        optimizer.step()
        return params[0].detach()

    assert torch.equal(run(SGD, flatten=True, backend=backend), run(torch.optim.SGD))


def test_a_parameter_of_a_flat_buffer_may_be_reshaped():
    params = [torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(2))]
    optimizer = SGD(params, lr=1.0, flatten=True)
    params[0].data = params[0].data.view(2, 4)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all((param == 0).all() for param in params)


def test_a_plan_for_many_sets_of_gradients_is_not_lost_among_them():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(100)]
    optimizer = SGD(params, lr=0.1, backend="native")
    generator = torch.Generator().manual_seed(0)
    n_prepared = []
    for _ in range(400):
        chosen = torch.randperm(100, generator=generator)[:8].tolist()
        for index, param in enumerate(params):
            param.grad = torch.ones(3) if index in chosen else None
        before = set(map(id, optimizer._updater.plans.latest()))
        kept = optimizer._updater.plans.latest()
        optimizer.step()
        n_prepared.append(len(set(map(id, optimizer._updater.plans.latest())) - before))
        del kept
    assert n_prepared[0] == 1
    assert sum(n_prepared[-100:]) < 10


def test_a_layer_that_is_frozen_in_between_keeps_no_gradients_of_others():
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    optimizer = SGD(model.parameters(), lr=0.1, release_gradients=True)
    for trained in ((0, 1, 2), (1, 2), (0, 1, 2)):
        for index, layer in enumerate(model):
            layer.requires_grad_(index in trained)
        model(torch.ones(1, 4)).sum().backward()
        assert all(param.grad is None for param in model.parameters())
        optimizer.step()


def test_hypergradients_of_betas_are_pytorchs():
    def run(cls):
        beta = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
        other = torch.tensor(0.99, dtype=torch.float64, requires_grad=True)
        param = torch.ones(2, dtype=torch.float64, requires_grad=True).clone()
        optimizer = cls([param], lr=0.1, betas=(beta, other), differentiable=True)
        for step in range(4):
            param.grad = torch.ones(2, dtype=torch.float64) * (step + 1)
            optimizer.step()
        return torch.stack(torch.autograd.grad(param.sum(), (beta, other)))

    torch.testing.assert_close(run(Adam), run(torch.optim.Adam))


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"clip_norm": 1.0}])
def test_clipping_by_norms_that_autograd_does_not_see_is_refused(options):
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"differentiable=True with .*: autograd does not see the norm"):
        SGD([param], differentiable=True, **options)
    optimizer = SGD([torch.nn.Parameter(torch.ones(2))], **options)
    with pytest.raises(ValueError, match="differentiable=True with"):
        optimizer.add_param_group({"params": [param], "differentiable": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("is_scaled", [False, True])
def test_what_a_release_left_to_the_step_goes_with_it(is_scaled):
    """A model whose last layer takes part in every other step, without a `zero_grad`."""
    runs = []
    for release in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=is_scaled)
        optimizer = Adam(model.parameters(), release_gradients=scaler if release else False)
        for n_layers in (3, 2, 3, 2):
            scaler.scale(model[:n_layers](torch.ones(2, 4)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            if not release:
                optimizer.zero_grad()
            assert all(param.grad is None for param in model.parameters())
        runs.append(list(model.parameters()))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("backend", ["native", "eager", None])
@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.float32}], ids=str)
@pytest.mark.parametrize("algorithm", [Adam, SGD])
def test_parameters_of_one_byte_are_updated_in_float32(algorithm: Any, options: Any, backend: str | None) -> None:
    dtype = torch.float8_e4m3fn
    param, wide = (torch.nn.Parameter(torch.ones(20).to(each)) for each in (dtype, torch.float32))
    for each in (param, wide):
        each.grad = torch.full((20,), 2.0).to(each.dtype)
        algorithm([each], lr=0.25, backend=backend, **options).step()
    assert torch.equal(param.float(), wide.detach().to(dtype).float())


@pytest.mark.parametrize(
    "dtypes", [(torch.float8_e4m3fn, torch.float32), (torch.float32, torch.float8_e5m2)], ids=str
)
def test_dtypes_that_kernels_do_not_know_are_refused_before_a_step_counts(dtypes: Any) -> None:
    param = torch.nn.Parameter(torch.ones(20, device=home("triton")).to(dtypes[0]))
    param.grad_dtype = None  # any
    param.grad = torch.ones(20, device=home("triton")).to(dtypes[1])
    optimizer = Adam([param], backend="triton", state_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"backend='triton' is impossible here: .* are of torch.float8"):
        optimizer.step()
    assert not optimizer.state[param]


@each_backend
@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_a_state_that_inference_mode_made_is_updated_with_the_others(key, backend):
    params = [one(backend) for _ in range(3)]
    optimizer = Adam(params, lr=0.1, backend=backend)
    optimizer.step()
    with torch.inference_mode():
        optimizer.state[params[1]][key] = optimizer.state[params[1]][key].clone()
    optimizer.step()
    assert all(torch.equal(param, params[0]) for param in params)
    assert [float(optimizer.state[param]["step"]) for param in params] == [2, 2, 2]


@each_backend
def test_a_gradient_that_inference_mode_made_is_zeroed_with_the_others(backend):
    params = [one(backend) for _ in range(2)]
    optimizer = Adam(params, lr=0.1, backend=backend)
    for zero in (partial(optimizer.step, zero_grad=True), partial(optimizer.zero_grad, set_to_none=False)):
        params[0].grad = torch.ones_like(params[0])
        with torch.inference_mode():
            params[1].grad = torch.ones_like(params[1])
        zero()
        assert not any(param.grad.any() for param in params)
    assert torch.equal(*params)
    assert not torch.equal(params[0], one(backend))


@each_backend
@pytest.mark.parametrize("algorithm", [Adam, SGD])
def test_defaults_of_others_are_no_options_of_groups(algorithm: Any, backend: str) -> None:
    params = [one(backend), one(backend)]
    ours, alone = (algorithm([param], lr=0.1, backend=backend) for param in params)
    ours.defaults["warmup"] = 10
    for optimizer in (ours, alone):
        optimizer.step()
    assert torch.equal(*params)
    assert "warmup" not in ours.param_groups[0]
