"""Models by name. A builder takes (classes, shape) and keyword-only options, and returns a module."""

from collections.abc import Callable, Mapping
from importlib import import_module

from torch import nn

from ..seeds import isolated
from .network import Model, from_module
from .resnet import ResNet


def resnet8(classes: int, shape: tuple[int, ...]) -> nn.Module:
    """FedLoRA's network for CIFAR-10: 7x7/2 stem, widths 64, 128, 256; 1,235,274 parameters."""
    return ResNet(classes, shape[0], (64, 128, 256), imagenet_stem=True)


def resnet10(classes: int, shape: tuple[int, ...]) -> nn.Module:
    """FedLoRA's network for CIFAR-100 and Tiny ImageNet: widths 64, 128, 256, 512."""
    return ResNet(classes, shape[0], (64, 128, 256, 512), imagenet_stem=True)


def cifar_resnet8(classes: int, shape: tuple[int, ...]) -> nn.Module:
    """The CIFAR-style ResNet-8: 3x3 stem, widths 16, 32, 64; 78,042 parameters for 10 classes."""
    return ResNet(classes, shape[0], (16, 32, 64), imagenet_stem=False)


def cnn(classes: int, shape: tuple[int, ...], *, width: int = 16, hidden: int = 64) -> nn.Module:
    """Two 3x3 convolutions (``width``, 2 ``width``) with 2x2 max pools, a hidden Linear, a head."""
    channels, height, breadth = shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 4) * (breadth // 4), hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


NAMES: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder for builder in (resnet8, resnet10, cifar_resnet8, cnn)
}


def build(name: str, options: Mapping, classes: int, shape: tuple[int, ...], seed: int) -> Model:
    """The model ``name`` with initial weights of ``seed``.

    ``name``: a key of NAMES, ``torchvision:<model>`` (any classification model), or
    ``module:callable``, called with ``classes`` and ``shape`` and returning an nn.Module.
    Raises ValueError when there is no such model or it refuses its options or inputs.
    """
    with isolated(seed, "model"):
        module = _module(name, dict(options), classes, shape)
        return from_module(module, classes, shape)


def _module(name: str, options: dict, classes: int, shape: tuple[int, ...]) -> nn.Module:
    home, _, attribute = name.partition(":")
    try:
        if name in NAMES:
            return NAMES[name](classes, shape, **options)
        if home == "torchvision":
            from ..vision import torchvision

            return torchvision().models.get_model(attribute, weights=None, num_classes=classes, **options)
        module = getattr(import_module(home), attribute)(classes=classes, shape=shape, **options)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"name = {name}: cannot be built: {error}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"name = {name}: returned {type(module).__name__}, not a torch.nn.Module")
    return module
