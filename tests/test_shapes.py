"""The shape lists are the models': their parameters are counted as the models' authors count them."""

import math

import pytest

from dragon.vm.measuring import shapes


@pytest.mark.parametrize(
    ("found", "n_tensors", "numel"),
    [
        (shapes.gpt2(12, 768), 148, 124_439_808),
        (shapes.gpt2(48, 1600), 580, 1_557_611_200),
        (shapes.llama3(32), 291, 8_030_261_248),
        (shapes.resnet50(), 161, 25_557_032),
        (shapes.vit_b(), 152, 86_567_656),
        (shapes.equal(465, 1000), 465, 465_000),
    ],
    ids=["GPT-2 124M", "GPT-2 1.5B", "Llama-3-8B", "ResNet-50", "ViT-B/16", "465 groups"],
)
def test_a_model_has_as_many_tensors_and_parameters_as_published(
    found: shapes.Shapes, n_tensors: int, numel: int
) -> None:
    assert len(found) == n_tensors
    assert sum(map(math.prod, found)) == numel
