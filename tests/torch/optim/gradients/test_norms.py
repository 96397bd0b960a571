"""Norms in torch operations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.torch.optim._gradients import norms, scaling
from dragon.vm.torch.optim._gradients.norms import SquareSum, as_real, norms_of
from dragon.vm.torch.optim._options import Settings

EPS = torch.finfo(torch.float32).eps


def exact_norm(grads):
    parts = (part for grad in grads for part in grad.split(1_000_000))
    return math.sqrt(math.fsum(float(part.abs().double().square().sum()) for part in parts))


@given(
    sizes=st.lists(st.sampled_from([0, 1, 3, 1023, 1024, 1025, 65535, 65536, 70001]), min_size=1, max_size=5),
    exponent=st.sampled_from([-30, -24, -19, 0, 15, 18, 19, 30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_the_norm_is_within_four_eps_whatever_the_range(sizes, exponent, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    grads = [(torch.randn(n, generator=generator) * 10.0**exponent).to(dtype) for n in sizes]
    expected = exact_norm(grads)
    assert abs(math.sqrt(SquareSum(grads)(grads)) - expected) <= 4 * EPS * expected


@pytest.mark.parametrize("shapes", [[(2, 1024), (4, 5)], [(2, 3), (4,), (1, 1, 1)], [(300, 301), (90, 4, 256)]])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 4 * EPS), (torch.float64, 1e-12)])
def test_gradients_of_any_shape_count_once_and_those_of_fp64_in_fp64(shapes, dtype, error):
    grads = [torch.full(shape, 0.1, dtype=dtype) for shape in shapes]
    expected = exact_norm(grads)
    assert abs(math.sqrt(SquareSum(grads)(grads)) - expected) <= error * expected


@pytest.mark.parametrize("n", [5 * 1024, 7 * 1024 + 5, 90_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_are_widened_some_at_a_time_are_each_counted_once(n, dtype, monkeypatch):
    monkeypatch.setattr(norms, "_N_WIDENED", 3)
    grads = [(torch.arange(n) % 1013 / 7).to(dtype)]
    expected = exact_norm(grads)
    assert abs(math.sqrt(SquareSum(grads)(grads)) - expected) <= 4 * EPS * expected


@pytest.mark.parametrize("n", [1024, 65536])
@pytest.mark.parametrize("at", [0, 5, 1023])
def test_one_element_that_outweighs_all_others_loses_few_of_them(n, at):
    # Half an eps: each square is lost where it is added to 1.
    grad = torch.full((n,), 2.0**-12.5)
    grad[at] = 1.0
    expected = exact_norm([grad])
    assert abs(math.sqrt(SquareSum([grad])([grad])) - expected) <= 32 * EPS * expected


def test_the_norm_of_a_hundred_million_elements_is_within_four_eps_where_torch_is_not():
    grads = [torch.rand(100_000_000)]
    expected = exact_norm(grads)
    assert abs(math.sqrt(SquareSum(grads)(grads)) - expected) <= 4 * EPS * expected
    with torch.no_grad():
        torchs = float(torch.nn.utils.get_total_norm(grads))
    assert abs(torchs - expected) > 4 * EPS * expected


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_element_that_is_not_finite_shows(value):
    grads = [torch.ones(1_000_000), torch.ones(3)]
    grads[0][765_432] = value
    assert not math.isfinite(SquareSum(grads)(grads))
    assert not norms_of(grads, math.inf).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("norm_type", [2, math.inf])
def test_the_norm_of_an_empty_gradient_is_zero(norm_type, dtype):
    grads = [torch.ones(0, dtype=dtype), torch.ones(1, dtype=dtype), torch.ones(3, 0, dtype=dtype)]
    assert norms_of(grads, norm_type).tolist() == [0.0, 1.0, 0.0]
    assert SquareSum(grads)(grads) == 1


def test_complex_gradients_count_both_parts():
    grads = [torch.full((5,), 3 + 4j, dtype=torch.complex64)]
    assert SquareSum(grads)(grads) == 125
    assert norms_of(grads, 2).item() == pytest.approx(math.sqrt(125))
    assert norms_of(grads, math.inf).item() == 4


def test_a_complex_tensor_is_seen_as_real_pairs():
    tensor = torch.tensor([1 + 2j])
    assert as_real(tensor).tolist() == [[1.0, 2.0]]
    assert as_real(tensor).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("of_grads", ["cpu", "meta"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_the_host_sums_with_others_where_accelerators_are(clip_norm, of_grads, monkeypatch):
    """Where its gradients are, or at least its other parameters."""
    met = []

    class Shared:
        device = torch.device("meta" if of_grads == "cpu" else "cpu")
        is_of_each = bool(clip_norm)

        def reduce(self, squares, found_inf, *, largest, skip_nonfinite):
            met.append(squares.device.type)
            return torch.ones(1), torch.zeros(1)

    monkeypatch.setattr(scaling, "meeting_device", lambda grads: torch.device(of_grads))
    group = {"clip_norm": clip_norm, "grad_scale": 1.0, "maximize": False}
    settings = Settings(skip_nonfinite=True)
    scaling.gradient_factors([torch.ones(3)], [0], [group], settings, scaling.Scaling(), float, Shared())
    assert met == ["meta"]
