"""Parameter shapes of well-known models, in the order in which the models hold them."""

from __future__ import annotations

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]


def equal(n_tensors: int, numel: int) -> Shapes:
    """`n_tensors` vectors of one length."""
    return ((numel,),) * n_tensors


def gpt2(n_layers: int, width: int, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """GPT-2, whose output layer shares the token embedding; https://github.com/openai/gpt-2."""
    norm: Shapes = ((width,), (width,))
    attention: Shapes = ((width, 3 * width), (3 * width,), (width, width), (width,))
    mlp: Shapes = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    return ((vocabulary, width), (context, width), *(norm + attention + norm + mlp) * n_layers, *norm)


def llama3(
    n_layers: int, width: int = 4096, kv_width: int = 1024, hidden: int = 14336, vocabulary: int = 128256
) -> Shapes:
    """Llama 3, by default of the 8B size; https://arxiv.org/abs/2407.21783, table 3."""
    attention: Shapes = ((width, width), (kv_width, width), (kv_width, width), (width, width))
    mlp: Shapes = ((hidden, width), (hidden, width), (width, hidden))
    norms: Shapes = ((width,), (width,))
    return ((vocabulary, width), *(attention + mlp + norms) * n_layers, (width,), (vocabulary, width))


def resnet50() -> Shapes:
    """ResNet-50 for 1000 classes; https://arxiv.org/abs/1512.03385, table 1."""
    shapes: list[Shape] = []

    def convolution(outputs: int, inputs: int, size: int) -> None:
        """A convolution without bias, and the scale and shift of its batch normalisation."""
        shapes.extend([(outputs, inputs, size, size), (outputs,), (outputs,)])

    convolution(64, 3, 7)
    inputs = 64
    for width, n_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(n_blocks):
            convolution(width, inputs, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return (*shapes, (1000, inputs), (1000,))


def vit_b(width: int = 768, n_layers: int = 12, n_patches: int = 196, patch: int = 16) -> Shapes:
    """ViT-B/16 for images of 224 x 224 and 1000 classes; https://arxiv.org/abs/2010.11929, table 1."""
    norm: Shapes = ((width,), (width,))
    attention: Shapes = ((3 * width, width), (3 * width,), (width, width), (width,))
    mlp: Shapes = ((4 * width, width), (4 * width,), (width, 4 * width), (width,))
    embedding: Shapes = ((1, 1, width), (width, 3, patch, patch), (width,), (1, n_patches + 1, width))
    return (*embedding, *(norm + attention + norm + mlp) * n_layers, *norm, (1000, width), (1000,))
