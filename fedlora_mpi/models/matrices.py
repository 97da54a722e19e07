"""Decide to which leaves of a network a low-rank part can be added, and say why not to others."""

import math
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .watching import Matrix, owning_module

_MATRIX_LAYERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CONV1D = "transformers.pytorch_utils.Conv1D"  # transformers is optional


def matrix_kind(module: nn.Module, name: str, value: Tensor, products: dict[str, Matrix]) -> Matrix:
    """Return how a low-rank part reads the parameter ``name`` as a matrix; "" if it cannot.

    ``products`` says how the products of a forward pass use parameters; it decides for modules that
    are no layers of torch.
    """
    owner, dims = module.get_submodule(owning_module(name)), value.dim()
    if dims < 2 or isinstance(owner, _EMBEDDINGS) or _is_reparametrized(owner, name):
        return ""
    if isinstance(owner, _ConvNd) and dims > 2:
        return "transposed" if isinstance(owner, _ConvTransposeNd) else "conv"
    if _is_input_first(owner):
        return "transposed"
    if isinstance(owner, _MATRIX_LAYERS) and (dims == 2 or isinstance(owner, nn.Bilinear)):
        return "linear"
    return products.get(name, "") if value.numel() > max(value.shape) else ""


class Fused(NamedTuple):
    """How a weight holds several matrices: slices of equal size, one after another.

    ``axis``: 0 if a slice is rows of the weight, 1 if it is columns.
    """

    matrices: tuple[str, ...]
    axis: int


def find_fused(module: nn.Module, name: str, shape: tuple[int, ...]) -> Fused | None:
    """Return the matrices that a parameter holds; None if it is one matrix.

    torch's attention has W_q, W_k and W_v [d, d] in one parameter [3 d, d], and transformers'
    GPT-2 has their transposes in one of [d, 3 d].
    """
    layer, _, parameter = name.rpartition(".")
    owner = module.get_submodule(layer)
    if isinstance(owner, nn.MultiheadAttention) and parameter == "in_proj_weight":
        return Fused(("q", "k", "v"), 0)
    is_conv1d = f"{type(owner).__module__}.{type(owner).__name__}" == _CONV1D
    if is_conv1d and layer.endswith("c_attn") and shape[1] == 3 * shape[0]:
        return Fused(("q", "k", "v"), 1)
    return None


def why_no_matrix(module: nn.Module, name: str, shape: tuple[int, ...], role: str) -> str:
    """Return why a leaf is not read as a matrix."""
    if role in ("norm", "stats"):
        return "of a normalisation layer" if role == "norm" else "not trained"
    if len(shape) < 2:
        return "a vector" if shape else "a number"
    owner = module.get_submodule(owning_module(name))
    if isinstance(owner, _EMBEDDINGS):
        return "an embedding, a table of rows"
    if _is_reparametrized(owner, name):
        return "what a layer computes its weight from"
    return (
        "one row" if math.prod(shape) == max(shape) else "enters no matrix product or convolution"
    )


def _is_input_first(owner: nn.Module) -> bool:
    """Return whether the layer is transformers' Conv1D, a Linear whose weight is [in, out]."""
    kind = type(owner)  # transformers is optional
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def _is_reparametrized(owner: nn.Module, name: str) -> bool:
    """Return whether the layer computes its weight from this parameter."""
    hooks = owner._forward_pre_hooks.values()
    return ".parametrizations." in name or any(
        isinstance(hook, WeightNorm | SpectralNorm) for hook in hooks
    )
