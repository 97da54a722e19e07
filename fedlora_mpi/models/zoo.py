"""Build models by name. A builder maps (classes, shape) and keyword-only options to a module.

A builder with a parameter ``tokens`` is for texts: inputs are [B, L] token ids below ``tokens``.
Its parameter ``padding`` receives the token id of padding; without this parameter it must be 0.
A builder with a parameter ``packed`` can make networks for rows of several texts, see ``packing``.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..core.seeds import isolate_rng
from ..core.user_code import describe_error, import_object
from . import huggingface, peft_files
from . import weights as files
from .coupling import couples_examples
from .gpt import GPT, PackedGPT
from .network import Model, from_module
from .packing import check_packing
from .quantized import Quantization, quantize
from .resnet import ResNet
from .transformer import Transformer
from .vision_transformer import VisionTransformer


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
    """Two 3x3 convolutions (``width``, 2 ``width``) with 2x2 max pools, then two Linears."""
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


def mlp(classes: int, shape: tuple[int, ...], *, hidden: int = 128, layers: int = 1) -> nn.Module:
    """``layers`` Linears of ``hidden`` outputs with ReLU, then a Linear; for any input shape."""
    if layers < 1:
        raise ValueError(f"layers = {layers}: must be at least 1")
    sizes = [math.prod(shape), *[hidden] * layers]
    body = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *body, nn.Linear(hidden, classes))


def transformer(
    classes: int,
    shape: tuple[int, ...],
    tokens: int,
    padding: int = 0,
    *,
    width: int = 64,
    heads: int = 4,
    layers: int = 2,
    feedforward: int = 128,
    dropout: float = 0.0,
) -> nn.Module:
    """A Transformer encoder for texts of up to ``shape[0]`` words; its head takes their mean."""
    sizes = _encoder_sizes(width, heads, layers, feedforward, dropout)
    return Transformer(classes, shape[0], tokens, padding, **sizes)


def vit(
    classes: int,
    shape: tuple[int, ...],
    *,
    patch: int = 4,
    width: int = 128,
    heads: int = 4,
    layers: int = 6,
    feedforward: int = 256,
    dropout: float = 0.0,
) -> nn.Module:
    """A vision Transformer for images of ``patch`` x ``patch`` pixels a token; 811,146 parameters
    for CIFAR-10.
    """
    sizes = _encoder_sizes(width, heads, layers, feedforward, dropout)
    channels, *sides = shape
    if patch < 1 or any(side % patch for side in sides):
        raise ValueError(
            f"patch = {patch}: must be at least 1 and divide the sides of the images, "
            f"{sides[0]} x {sides[1]} pixels"
        )
    patches = math.prod(side // patch for side in sides)
    return VisionTransformer(classes, channels, patches, patch=patch, **sizes)


def gpt(
    classes: int,
    shape: tuple[int, ...],
    tokens: int,
    padding: int = 0,
    packed: bool = False,
    *,
    width: int = 64,
    heads: int = 4,
    layers: int = 2,
    feedforward: int = 256,
    dropout: float = 0.0,
    tied: bool = True,
) -> nn.Module:
    """A causal Transformer that predicts the next token of texts of up to ``shape[0]`` tokens."""
    sizes = _encoder_sizes(width, heads, layers, feedforward, dropout)
    return (PackedGPT if packed else GPT)(shape[0], classes, tied=tied, **sizes)


def _encoder_sizes(
    width: int, heads: int, layers: int, feedforward: int, dropout: float
) -> dict[str, Any]:
    """Return the settings of a Transformer encoder; raise ValueError for those it cannot have."""
    sizes = {"width": width, "heads": heads, "layers": layers, "feedforward": feedforward}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} = {size}: must be an integer of at least 1")
    if width % heads:
        raise ValueError(f"heads = {heads}: must divide width = {width}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout}: must be at least 0 and below 1")
    return sizes | {"dropout": dropout}


def hf(
    classes: int,
    shape: tuple[int, ...],
    tokens: int = 0,
    padding: int = 0,
    positions: int = 0,
    dtype: str | None = None,
    packed: bool = False,
    *,
    folder: str,
    resize: bool = False,
) -> nn.Module:
    """The pre-trained model in ``folder``, saved by Hugging Face's transformers: a classifier of
    images or texts, or a causal language model.

    It is for images, which ``resize`` enlarges to the size that the model reads, or for the texts
    of its tokenizer. If ``folder`` is a config.json, the same network is built without pre-trained
    weights.
    """
    kind = getattr(torch, dtype or "float32")
    if not tokens:
        return huggingface.load_image_classifier(folder, classes, shape, kind, resize)
    if resize:
        raise ValueError("resize = true: the data are texts; leave it out")
    if positions:
        return huggingface.load_causal(folder, shape[0], tokens, kind, packed)
    return huggingface.load_classifier(folder, classes, shape[0], tokens, padding, kind)


def _yi_cnn(
    number: int, first_channels: int, second_channels: int, hidden: int, parameters: str
) -> Callable[..., nn.Module]:
    """Return the builder of the ``number``-th network of Yi et al., the authors of pFedLoRA."""

    def builder(classes: int, shape: tuple[int, ...]) -> nn.Module:
        channels, *size = shape
        if min(size) < 16:
            raise ValueError(
                "two 5x5 convolutions with 2x2 pools need images of at least 16 x 16 pixels"
            )
        height, width = (((side - 4) // 2 - 4) // 2 for side in size)
        return nn.Sequential(
            nn.Conv2d(channels, first_channels, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first_channels, second_channels, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(second_channels * height * width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 500),
            nn.ReLU(),
            nn.Linear(500, classes),
        )

    builder.__name__ = f"cnn{number}"
    builder.__doc__ = (
        f"CNN-{number} of pFedLoRA's authors: 5x5 convolutions ({first_channels}, "
        f"{second_channels}), Linears ({hidden}, 500);\n    {parameters} parameters for CIFAR-10."
    )
    return builder


YI_CNNS = (
    _yi_cnn(1, 16, 32, 2000, "2,621,558"),
    _yi_cnn(2, 16, 16, 2000, "1,815,142"),
    _yi_cnn(3, 16, 32, 1000, "1,320,558"),
    _yi_cnn(4, 16, 32, 800, "1,060,358"),
    _yi_cnn(5, 16, 32, 500, "670,058"),
)

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder
    for builder in (resnet8, resnet10, cifar_resnet8, cnn, *YI_CNNS, mlp, transformer, gpt, vit, hf)
}
_ANY_NUMBERS = ("mlp",)  # the other networks of BUILDERS are for images or texts
_IMAGES_AND_TEXTS = ("hf",)


def build(
    name: str,
    options: Mapping,
    classes: int,
    shape: tuple[int, ...],
    seed: int,
    tokens: int = 0,
    padding: int = 0,
    *,
    weights: str | None = None,
    adapter: str | None = None,
    head: str | None = None,
    output: str | int | None = None,
    positions: int = 0,
    dtype: str | None = None,
    quantization: Quantization | None = None,
    packed: bool = False,
    shapes_alone: bool = False,
) -> Model:
    """Return the model ``name`` with initial weights drawn from ``seed``, or read from ``weights``.

    ``name`` is a key of BUILDERS, ``torchvision:<model>`` (any classification model), or
    ``module:callable``. The callable gets ``classes`` and ``shape`` (for texts also ``tokens``, and
    ``padding`` if it has that parameter) and returns an nn.Module. ``weights``: see
    ``weights.find_file``; ``adapter``: see ``peft_files.load_adapter``; ``head``, ``output``,
    ``positions`` and ``dtype`` (torch's name): see ``network.from_module``; ``quantization``: see
    ``quantized.quantize``; ``packed``: whether an input is a row of several texts.
    ``shapes_alone``: build a network of this package without values, on the device meta; no weights
    are read, whatever their size.

    Raises ValueError if there is no such model, if it refuses its options or inputs, if the weights
    or the adapter are missing or do not fit, if it has no such head or output, or if it cannot read
    several texts in a row.
    """
    on_meta = shapes_alone and not is_external(name)
    with isolate_rng(seed, "model"), torch.device("meta") if on_meta else nullcontext():
        own = _own_options(name, {"head": head, "output": output})
        inputs = {"positions": positions, "dtype": dtype} if name == "hf" else {}
        module = _build_module(
            name, {**options, **own, **inputs}, classes, shape, tokens, padding, packed
        )
        head = None if "head" in own else head
        output = None if "output" in own else output
        model = from_module(
            module,
            classes,
            shape,
            tokens,
            head=head,
            output=output,
            positions=positions,
            dtype=getattr(torch, dtype) if dtype else None,
            trial=is_external(name) or name == "hf" and not on_meta,
            keep=not is_external(name),
        )
        if is_external(name) and not name.startswith("torchvision:"):
            model = replace(model, couples=couples_examples(model, seed))
    if packed and not on_meta:
        try:
            check_packing(partial(model.eval_mode(), model.initial), tokens, shape[0])
        except ValueError as error:
            raise ValueError(f"name = {name}: {error}") from error
    model = _load_files(model, name, None if on_meta else weights, adapter)
    if quantization is not None:
        try:
            model = quantize(model, quantization)
        except ValueError as error:
            raise ValueError(f"quantization = {quantization}: {error}") from error
    return model.to(torch.device("meta")) if on_meta else model


def _load_files(model: Model, name: str, weights: str | None, adapter: str | None) -> Model:
    """Return the same network with the initial weights and the adapter of these files, if any."""
    if weights is not None:
        try:
            tree = files.read(*files.find_file(name, weights), keep_double=True)
            model = files.load_weights(model, tree)
        except ValueError as error:
            raise ValueError(f"weights = {weights}: {error}") from error
    if adapter is not None:
        try:
            model = peft_files.load_adapter(model, adapter)
        except ValueError as error:
            raise ValueError(f"adapter = {adapter}: {error}") from error
    return model


def _own_options(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings that a user's builder has as parameters, which are then its own."""
    if not is_external(name) or name.startswith("torchvision:"):
        return {}
    try:
        builder = import_object(name)
    except (Exception, SystemExit):  # ``_build_module`` says what is wrong
        return {}
    return {
        key: value
        for key, value in settings.items()
        if value is not None and _has_parameter(builder, key)
    }


def is_external(name: str) -> bool:
    """Return whether the name of a network or method refers to a module outside this package."""
    return ":" in name


class Origin(NamedTuple):
    """Files, existing or not, from which a network is made.

    ``key`` and ``value`` are the entry in the config's ``model`` block that names them.
    """

    key: str
    value: str
    files: tuple[Path, ...]


def find_origins(
    name: str, options: Mapping, weights: str | None, adapter: str | None
) -> list[Origin]:
    """Return the files that ``build`` reads for the same arguments."""
    origins = []
    if name == "hf":
        origins.append(
            Origin("folder", options["folder"], huggingface.required_files(options["folder"]))
        )
    if weights is not None:
        origins.append(Origin("weights", weights, (files.find_file(name, weights).path,)))
    if adapter is not None:
        origins.append(Origin("adapter", adapter, peft_files.required_files(adapter)))
    return origins


def _build_module(
    name: str,
    options: dict,
    classes: int,
    shape: tuple[int, ...],
    tokens: int,
    padding: int,
    packed: bool,
) -> nn.Module:
    try:
        builder = _builder(name)
        arguments: dict[str, Any] = {"classes": classes, "shape": shape}
        if packed and not _has_parameter(builder, "packed"):
            raise ValueError(
                "it reads one text at a time; set data.language.packing = false, or name gpt or hf"
            )
        arguments |= {"packed": True} if packed else {}
        is_for_texts = _has_parameter(builder, "tokens")
        if is_for_texts != (tokens > 0) and name not in _IMAGES_AND_TEXTS:
            inputs = "images" if len(shape) == 3 else "numbers"
            kinds = ("images", "texts") if tokens else ("texts", inputs)
            raise ValueError("it is for {}, the data are {}".format(*kinds))
        is_known = name in BUILDERS or name.startswith("torchvision:")
        if not tokens and len(shape) != 3 and is_known and name not in _ANY_NUMBERS:
            raise ValueError(
                f"it is for images, an input of the data has the shape {list(shape)}; name "
                f"{' or '.join(_ANY_NUMBERS)}, or a network of your own"
            )
        if tokens:
            arguments["tokens"] = tokens
            if _has_parameter(builder, "padding"):
                arguments["padding"] = padding
            elif padding:
                raise ValueError(
                    f"it takes 0 for padding, data.text.tokenizer {padding}; give it a parameter "
                    "padding"
                )
        module = builder(**arguments, **options)
    except (Exception, SystemExit) as error:  # a user's builder may raise anything
        raise ValueError(f"name = {name}: cannot be built: {describe_error(error)}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"name = {name}: returned {type(module).__name__}, not a torch.nn.Module")
    return module


def _builder(name: str) -> Callable[..., nn.Module]:
    """Return the builder of a network's name."""
    library, _, attribute = name.partition(":")
    if library == "torchvision":
        return partial(_build_torchvision, attribute)
    return BUILDERS[name] if name in BUILDERS else import_object(name)


def _has_parameter(builder: Callable, parameter: str) -> bool:
    """Return whether a builder has a parameter of this name."""
    try:
        return parameter in signature(builder).parameters
    except ValueError:  # a builder in C may have no signature
        return False


def _build_torchvision(model: str, classes: int, shape: tuple[int, ...], **options) -> nn.Module:
    from ..core.vision import import_torchvision

    return import_torchvision().models.get_model(
        model, weights=None, num_classes=classes, **options
    )
