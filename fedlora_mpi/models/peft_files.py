"""Read a LoRA adapter in the files of Hugging Face's peft, as a start of low-rank parts.

A folder has ``adapter_config.json`` and ``adapter_model.safetensors``. Of a layer with the tensors
lora_A [r, in] and lora_B [out, r], the weight starts as W_0 + s B A, where s is lora_alpha / r, or
lora_alpha / sqrt(r) with use_rslora. Other tensors of the file replace the network's initial
leaves of these names (modules_to_save). peft itself is not needed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.paths import expand_home
from ..core.tree import Tree
from . import weights
from .huggingface import CausalHuggingFace, HuggingFace
from .network import Model, StartAdapter

_PREFIX = "base_model.model."  # in front of the base network's names
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
# A layer with one of these is no W_0 + s B A with fixed W_0.
_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
)
# Other ways to begin change W_0 when peft loads the adapter.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


def required_files(folder: str) -> tuple[Path, ...]:
    """Return the files to read from ``folder``, existing or not."""
    path = expand_home(folder)
    return path / "adapter_config.json", path / "adapter_model.safetensors"


def load_adapter(model: Model, folder: str) -> Model:
    """Return the same network with the adapter in ``folder`` as its ``adapter``.

    Raises ValueError if a file is missing or damaged, if the adapter is no plain LoRA, or for the
    first tensor that does not fit the network.
    """
    config_file, tensor_file = required_files(folder)
    config = _read_config(config_file)
    factors, whole = _sort_tensors(weights.read(tensor_file), _network_prefix(model))
    if not factors:
        raise ValueError(f"{tensor_file.name} holds no low-rank part")
    pairs = {n: _read_pair(model, n, pair, config) for n, pair in factors.items()}
    whole = {n: v for n, v in whole.items() if not _is_same_tie(model, n, v)}
    for name, value in whole.items():
        leaf = model.all_leaves.get(name)
        if leaf is None or leaf.shape != value.shape:
            shape = list(leaf.shape) if leaf else "absent"
            raise ValueError(f"{name} is {list(value.shape)} in the file, {shape} in the network")
    model = weights.replace_values(model, whole)
    return replace(model, adapter=StartAdapter(pairs, frozenset(whole)))


def _network_prefix(model: Model) -> str:
    """Return what stands in front of the names that peft knows."""
    module = model.modules[False]
    return module.PREFIX if isinstance(module, HuggingFace | CausalHuggingFace) else ""


def _sort_tensors(tree: Tree, prefix: str) -> tuple[dict[str, dict[str, Tensor]], Tree]:
    """Return {weight: {"A": lora_A, "B": lora_B}}, and the leaves that the file has whole.

    Both have their names in the network.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    whole = {}
    for name, value in tree.items():
        path = name.removeprefix(_PREFIX)
        if path == name:
            raise ValueError(f"{name} is no name of peft, which begins with {_PREFIX}")
        if match := _FACTOR.fullmatch(path):
            factors.setdefault(f"{prefix}{match[1]}.weight", {})[match[2]] = value
        elif "lora_" in path:
            raise ValueError(
                f"{name}: of low-rank parts only lora_A.weight and lora_B.weight are read"
            )
        else:
            whole[prefix + path.replace(".base_layer.", ".")] = value
    return factors, whole


def _read_config(file: Path) -> dict[str, Any]:
    """Return peft's settings; raise ValueError unless they are those of plain LoRA."""
    if not file.is_file():
        raise ValueError(f"there is no file {file.absolute()}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.name} is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file.name} is no JSON object")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file.name}: peft_type = {config.get('peft_type')}: must be LORA")
    for key in _VARIANTS:
        if config.get(key):
            raise ValueError(f"{file.name}: {key}: only plain LoRA is read, W_0 + s B A")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"{file.name}: init_lora_weights = {start}: changes the network's own weights; convert "
            "the adapter to plain LoRA (path_initial_model_for_weight_conversion of peft)"
        )
    return config


def _read_pair(
    model: Model, name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[Tensor, Tensor, float]:
    """Return (A [r, in], B [out, r], s) of a weight; raise ValueError if they do not fit it."""
    tied = next((n for n, first in model.ties.items() if name in (n, first)), None)
    if tied:
        raise ValueError(
            f"{name}: {tied} and {model.ties[tied]} are tied, one weight in two places; the "
            "adapter changes one place alone"
        )
    leaf = model.all_leaves.get(name)
    if leaf is None:
        raise ValueError(f"{name} is adapted, but absent in the network")
    if not leaf.is_linear or len(leaf.shape) != 2:
        reason = model.why_no_matrix(name) or "not of a linear layer"
        raise ValueError(f"{name} is adapted, but it is {reason}")
    sides = leaf.shape if leaf.matrix == "linear" else leaf.shape[::-1]
    out_side, in_side = sides
    A, B = (pair.get(letter, torch.empty(0)) for letter in "AB")
    rank = len(A)
    if A.shape != (rank, in_side) or B.shape != (out_side, rank) or not rank:
        raise ValueError(
            f"{name}: lora_A {list(A.shape)} and lora_B {list(B.shape)} must be [r, {in_side}] and "
            f"[{out_side}, r]"
        )
    if rank > min(sides):
        raise ValueError(f"{name}: has rank {rank}, above its shorter side {min(sides)}")
    module = name.removesuffix(".weight").removeprefix(_network_prefix(model))
    config_rank = _setting_of(config, "r", "rank_pattern", module)
    alpha = _setting_of(config, "lora_alpha", "alpha_pattern", module)
    if config_rank != rank:
        raise ValueError(f"{name}: has rank {rank}, in adapter_config.json {config_rank:g}")
    return A, B, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _setting_of(config: Mapping[str, Any], key: str, patterns_key: str, module: str) -> float:
    """Return the number of a module: that of the first pattern that matches, as in peft."""
    try:
        patterns = (config.get(patterns_key) or {}).items()
        matches = (v for p, v in patterns if re.match(rf"(.*\.)?({p})$", module))
        value = next(matches, config.get(key))
    except (AttributeError, TypeError, re.error) as error:
        raise ValueError(
            f"adapter_config.json: {patterns_key} must be a mapping of patterns to numbers"
        ) from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"adapter_config.json: {key} = {value}: must be a number")
    return value


def _is_same_tie(model: Model, name: str, value: Tensor) -> bool:
    """Return whether ``value`` is that of a tied leaf; raise ValueError if it is another."""
    first = model.ties.get(name, name)
    if name not in model.ties and first not in model.ties.values():
        return False
    known = model.all_values[first] if first in model.all_leaves else None
    if known is not None and (known.is_meta or torch.equal(value, known.to(value))):
        return True
    raise ValueError(f"{name}: is tied in the network, and the adapter has another value for it")
