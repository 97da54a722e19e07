"""Export a client's low-rank part as files for Hugging Face's peft.

An algorithm whose low-rank part is added to untrained weights has the method

    adapter(model, v) -> ({weight: (A [r, in], B [out, r], s)}, others)

where ``v`` are the variables of one client. The client's weights are W0 + s B A with W0 in
``model.initial``; ``others`` are the leaves that are trained in full, such as the head. The method
raises ValueError if the client has no such part.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import algorithm_name
from ..core.names import sliced_weight
from ..core.paths import expand_home
from ..core.tree import Tree
from ..models.huggingface import CausalHuggingFace, HuggingFace
from ..models.network import Model
from ..models.weights import pack_safetensors
from ..store.files import write_atomic
from .run_view import ClientView, RunView

LoraFactors = tuple[Tensor, Tensor, float]  # A, B, s


def export_adapter(run: RunView, client: int, folder: str | Path) -> Path:
    """Write a client's ``adapter_model.safetensors`` and ``adapter_config.json`` to a new folder.

    For a network ``hf``, ``peft.PeftModel.from_pretrained(base, folder)`` is then the client's own
    model. ``base`` is the causal language model of the network's folder, or the sequence classifier
    with as many classes, in float32; with ``model.weights`` it has those weights. Returns the
    folder. Raises ValueError if the client has no low-rank part that peft can hold, or if the
    folder cannot be created.
    """
    view, folder = run.client(client), expand_home(folder)
    pairs, others = _adapter(run, view)
    values = {name: torch.from_numpy(value) for name, value in view.weights.items()}
    leaves, config = adapter_content(view.network, pairs, others, values)
    tensors, config = (
        pack_safetensors(leaves),
        config | {"base_model_name_or_path": _base_folder(view)},
    )
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be created: {error.strerror}; choose another"
        ) from error
    write_atomic(folder / "adapter_model.safetensors", tensors)
    write_atomic(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
    return folder


def adapter_content(
    network: Model, pairs: Mapping[str, LoraFactors], others: Tree, values: Tree
) -> tuple[Tree, dict[str, Any]]:
    """Return peft's tensors and peft's config.

    values: all leaves of the client's own model. Some modules are written whole: the modules of
    ``others`` and of ``network.adapter``; for a network ``hf`` also the modules above the encoder
    (peft itself takes some of these) and those with leaves that the network's folder does not have.
    The pairs of slices of a weight become one pair of that weight.
    Raises ValueError for a low-rank part of another layer than a Linear, for a leaf that is in two
    places of the network (tied), or if no low-rank part is left.
    """
    module, pairs = network.modules[False], _join_slices(network, pairs)
    others = {name: values[name] for name in sorted(network.adapter.whole)} | {**others}
    for name in (*pairs, *others):
        if places := [n for n, first in network.ties.items() if name in (n, first)]:
            raise ValueError(
                f"{name}: is tied, one weight with {places[0]}, and peft would change one place "
                "alone; train it neither in full nor by a low-rank part"
            )
    for name in pairs:
        if not _is_linear(network, name):
            raise ValueError(
                f"{name}: is no weight of a Linear, and no other is exported; choose other layers"
            )
    input_first = any(network.all_leaves[name].matrix == "transposed" for name in pairs)
    hf = module if isinstance(module, HuggingFace | CausalHuggingFace) else None
    pairs = {_peft_name(hf, name): v for name, v in pairs.items()}
    others = {_peft_name(hf, name): v for name, v in others.items()}
    values = {_peft_name(hf, name): v for name, v in values.items()}
    head_names = [name for name in values if hf and (hf.is_above_encoder(name) or name in hf.fresh)]
    saved_modules = {_saved_module(hf, name) for name in (*others, *head_names)}

    def is_saved_whole(name):
        return any(name.startswith(f"{part}.") for part in saved_modules)

    adapted = {
        name.removesuffix(".weight"): pair
        for name, pair in pairs.items()
        if not is_saved_whole(name)
    }
    if not adapted:
        raise ValueError(
            "no low-rank part is outside of what is written whole "
            f"({', '.join(sorted(saved_modules))})"
        )
    leaves = {name: value for name, value in values.items() if is_saved_whole(name)}
    for name, (a, b, _) in adapted.items():
        leaves |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    leaves = {f"base_model.model.{name}": value for name, value in leaves.items()}
    config = _config(adapted, sorted(saved_modules), input_first)
    return leaves, {"task_type": hf.TASK if hf else None} | config


def _join_slices(network: Model, pairs: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Return ``pairs`` with one pair for each weight of which slices have pairs.

    Its A holds those of the slices one below the other. Its B is zero but for the rows of a slice
    in the columns of its rank, so B A changes the slices alone.
    """
    joined, parts = {}, defaultdict(list)
    for name, pair in pairs.items():
        if name in network.all_leaves:
            joined[name] = pair
        else:
            parts[sliced_weight(name)].append((name, pair))
    for weight, of_slices in parts.items():
        names, scale = list(network.slices(weight)), of_slices[0][1][2]
        columns = []
        for name, (_, b, s) in of_slices:
            rows = [torch.zeros_like(b)] * len(names)
            rows[names.index(name)] = b * (s / scale)
            columns.append(torch.cat(rows))
        joined[weight] = torch.cat([a for _, (a, _, _) in of_slices]), torch.cat(columns, 1), scale
    return joined


def _is_linear(network: Model, name: str) -> bool:
    """Return whether a leaf is the weight of a Linear or of transformers' Conv1D."""
    layer, _, leaf_name = name.rpartition(".")
    leaf = network.all_leaves[name]
    is_conv1d = leaf.is_linear and leaf.matrix == "transposed"
    is_linear = isinstance(network.modules[False].get_submodule(layer), nn.Linear)
    return leaf_name == "weight" and (is_linear or is_conv1d)


def _base_folder(view: ClientView) -> str | None:
    """Return the folder with the weights W0; None if they do not come from one folder alone."""
    origins = view.network_block.origins
    keys = [origin.key for origin in origins if origin.key != "adapter"]  # exported again
    # a folder with only a config.json has no weights
    if keys != ["folder"] or len(origins[0].files) == 1:
        return None
    return str(origins[0].files[0].parent.absolute())


def _adapter(run: RunView, view: ClientView) -> tuple[Mapping[str, LoraFactors], Tree]:
    """Return the result of the algorithm's ``adapter`` for the client.

    Raises ValueError if the algorithm has no such method.
    """
    algorithm = view.algorithm
    adapter = getattr(algorithm, "adapter", None)
    if not callable(adapter):  # pfedlora has a field of this name
        raise ValueError(
            f"{run.path}: algorithm {algorithm_name(algorithm)} has no adapter that stands alone"
        )
    with torch.no_grad():
        return adapter(view.network, view.variables)


def _peft_name(hf: HuggingFace | CausalHuggingFace | None, name: str) -> str:
    """Return the name of a leaf in the network that peft wraps."""
    return name.removeprefix(hf.PREFIX) if hf else name


def _saved_module(hf: HuggingFace | CausalHuggingFace | None, name: str) -> str:
    """Return the module that is written whole with the leaf ``name``.

    It is the leaf's module; above the encoder it is the outermost module.
    """
    module = name.rpartition(".")[0]
    if not module:
        raise ValueError(f"{name}: is of no module of its own, so peft cannot replace it")
    return module.partition(".")[0] if hf and hf.is_above_encoder(name) else module


def _config(
    adapted: Mapping[str, LoraFactors], saved_modules: list[str], input_first: bool
) -> dict[str, Any]:
    """Return peft's settings.

    ``r`` and ``lora_alpha`` = s r are the most common pair. The patterns list the modules with
    other values. input_first: whether weights are [in, out], as those of transformers' Conv1D.
    """
    rank_and_alpha = {
        name: (len(a), _integer_if_whole(s * len(a))) for name, (a, _, s) in adapted.items()
    }
    rank, alpha = Counter(rank_and_alpha.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, (r, _) in rank_and_alpha.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in rank_and_alpha.items() if a != alpha},
        "target_modules": sorted(rank_and_alpha),
        "modules_to_save": saved_modules or None,
        "bias": "none",
        "fan_in_fan_out": input_first,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def _integer_if_whole(alpha: float) -> int | float:
    """Return alpha as an integer if it is whole, as peft writes it."""
    return int(alpha) if float(alpha).is_integer() else float(alpha)
