"""Load a classifier of texts or images, or a causal language model, of Hugging Face's transformers
from a local folder.

Nothing is downloaded and no code from the folder runs. Leaves have their names in transformers,
with the prefix ``model.``. Where torch's default device is meta, files of weights are not read.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.extras import extra_imports
from ..core.paths import expand_home
from ..core.tree import Tree
from ..core.vision import import_torchvision
from . import weights
from .packing import unpack


class HuggingFace(nn.Module):
    """A network around ``model``, a ``...ForSequenceClassification`` of transformers.

    ``fresh``: names of the parameters that do not come from the files of weights.
    """

    PREFIX = "model."  # in front of transformers' names
    TASK: str | None = "SEQ_CLS"  # in peft's words

    def __init__(self, model: nn.Module, fresh: frozenset[str]) -> None:
        super().__init__()
        config: Any = model.config  # transformers is optional, and so are its types
        self.model: Any = model
        self.fresh = fresh
        self.padding: Any = getattr(config, "pad_token_id", None)  # images have none

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, classes] of token ids x [B, L]. Padding is masked."""
        # This is added to the attention scores. With a 0/1 mask, transformers would test whether it
        # hides anything, which vmap over clients does not allow.
        dtype = self.model.dtype
        attention_bias = torch.zeros(x.shape, dtype=dtype, device=x.device).masked_fill(
            x == self.padding, torch.finfo(dtype).min
        )
        return self.model(
            input_ids=x, attention_mask=attention_bias[:, None, None]
        ).logits  # [B, 1, 1, L]

    def is_above_encoder(self, name: str) -> bool:
        """Return whether a leaf belongs to the classifier and not to the pre-trained encoder.

        ``name`` is the leaf's name in transformers.
        """
        return not name.startswith(f"{self.model.base_model_prefix}.")


class ImageHuggingFace(HuggingFace):
    """A network around ``model``, a ``...ForImageClassification`` of transformers.

    ``size``: (height, width) in pixels to which images are enlarged; None: they are read as they
    are.
    """

    TASK = None  # peft has no word for it

    def __init__(
        self, model: nn.Module, fresh: frozenset[str], size: tuple[int, int] | None
    ) -> None:
        super().__init__(model, fresh)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, classes] of images x [B, ch, H, W]."""
        if self.size is not None:
            x = F.interpolate(x, self.size, mode="bilinear")
        return self.model(pixel_values=x).logits


class CausalHuggingFace(nn.Module):
    """A network around ``model``, a ``...ForCausalLM`` of transformers.

    Padding at the end of a text changes nothing before it, so it is not masked.
    """

    PREFIX, TASK = HuggingFace.PREFIX, "CAUSAL_LM"
    fresh: frozenset[str] = frozenset()  # all parameters come from the files of weights

    def __init__(self, model: nn.Module, tokens: int) -> None:
        super().__init__()
        self.model: Any = model
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the next token [B, L, tokens] of token ids x [B, L]."""
        length, dtype = x.shape[1], self.model.dtype
        shape = length, length
        future = torch.full(shape, torch.finfo(dtype).min, dtype=dtype, device=x.device)
        inputs = {"input_ids": x}
        # a model that counts its positions from a mask (OPT) cannot do so from attention scores
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            inputs["position_ids"] = torch.arange(length, device=x.device)[None]
        return self._logits(future.triu(1).expand(len(x), 1, length, length), **inputs)

    def _logits(self, attention_bias: Tensor, **inputs: Tensor) -> Tensor:
        """Return the logits of ``inputs`` with ``attention_bias`` [B, 1, L, L] on the attention
        scores, see ``HuggingFace``.
        """
        logits = self.model(attention_mask=attention_bias, use_cache=False, **inputs).logits
        # a model may have more rows of embeddings than its tokenizer has tokens
        return logits[..., : self.tokens]

    def is_above_encoder(self, name: str) -> bool:
        """Return False: peft adapts the head of a language model as any other layer."""
        return False


class PackedHuggingFace(CausalHuggingFace):
    """A causal language model whose inputs are rows of several texts, see ``packing``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the next token [B, L, tokens] of packed token ids x [B, L]."""
        texts, dtype = unpack(x, self.tokens), self.model.dtype
        attention_bias = torch.zeros(texts.visible.shape, dtype=dtype, device=x.device).masked_fill(
            ~texts.visible, torch.finfo(dtype).min
        )
        return self._logits(
            attention_bias[:, None], input_ids=texts.ids, position_ids=texts.positions
        )


def load_causal(
    folder: str,
    length: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
) -> CausalHuggingFace:
    """Return the language model in ``folder`` for texts of ``length`` token ids below ``tokens``,
    with parameters of type ``dtype``; ``packed``: for rows of several texts.

    The network is drawn from torch's global generator if ``folder`` is a config.json alone. Raises
    ValueError if a weight is missing or does not fit, if the model has fewer tokens, if it refuses
    texts of this length, or if it is not causal.
    """
    model, report = _load(folder, "MODEL_FOR_CAUSAL_LM_MAPPING", "causal language model", {}, dtype)
    if unfit := sorted({*report["missing_keys"], *(n for n, *_ in report["mismatched_keys"])}):
        others = f", and {len(unfit) - 1} more" if len(unfit) > 1 else ""
        raise ValueError(
            f"folder = {folder}: model.safetensors does not fit config.json: {unfit[0]} is "
            f"missing or of another shape{others}"
        )
    config: Any = model.config
    if tokens > config.vocab_size:
        raise ValueError(
            f"folder = {folder}: knows {config.vocab_size} tokens; the texts have {tokens}; give "
            "the tokenizer of this model"
        )
    longest = getattr(config, "max_position_embeddings", length)
    if length > longest:
        raise ValueError(
            f"folder = {folder}: reads texts of up to {longest} tokens, data.text.length = {length}"
        )
    module = (PackedHuggingFace if packed else CausalHuggingFace)(model, tokens)
    _check_causal(module, folder, length)
    return module


def load_classifier(
    folder: str,
    classes: int,
    length: int,
    tokens: int,
    padding: int,
    dtype: torch.dtype = torch.float32,
) -> HuggingFace:
    """Return the model in ``folder`` for texts of ``length`` token ids below ``tokens``, with
    parameters of type ``dtype``.

    The classifier is drawn from torch's global generator if the folder has none or one for another
    number of classes. So is a missing pooler, and the whole network if ``folder`` is a config.json
    alone. Raises ValueError if any other weight does not fit, if the data have other tokens than
    the model, or if the model treats a mask in another way (a decoder, for instance).
    """
    module = HuggingFace(
        *_load_checked(
            folder,
            classes,
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
            "sequence classifier",
            dtype,
        )
    )
    config = module.model.config
    if module.padding is None:
        raise ValueError(
            f"folder = {folder}: its config.json has no pad_token_id; {config.model_type} cannot "
            "be used"
        )
    if tokens > config.vocab_size or padding != module.padding:
        raise ValueError(
            f"folder = {folder}: knows {config.vocab_size} tokens, {module.padding} for padding; "
            f"data.text.tokenizer has {tokens}, {padding} for padding; give the tokenizer of this "
            "model"
        )
    _check_padding(module, folder, length)
    return module


def load_image_classifier(
    folder: str, classes: int, shape: tuple[int, ...], dtype: torch.dtype, resize: bool
) -> ImageHuggingFace:
    """Return the model in ``folder``, of this type, for images of ``shape`` [ch, H, W].

    ``resize``: images are enlarged to the size that the model reads. The classifier is drawn as in
    ``load_classifier``. Raises ValueError if any other weight does not fit, or if the model refuses
    such images.
    """
    model, fresh = _load_checked(
        folder, classes, "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "image classifier", dtype
    )
    size = getattr(model.config, "image_size", None)
    height_and_width = (size, size) if isinstance(size, int) else tuple(size or ())
    if resize and not height_and_width:
        raise ValueError(
            f"resize = true: {folder} does not say which size of images it reads; leave it out"
        )
    module = ImageHuggingFace(model, fresh, height_and_width if resize else None)
    with torch.no_grad():
        try:
            module.eval()(torch.zeros(1, *shape, dtype=dtype))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            way_out = "; resize: true enlarges images to the size that it reads"
            raise ValueError(
                f"folder = {folder}: refuses images of {' x '.join(map(str, shape))}: "
                f"{' '.join(str(error).split())}" + ("" if resize else way_out)
            ) from error
    return module


def required_files(folder: str) -> tuple[Path, ...]:
    """Return the files to read from ``folder``, existing or not: config.json, then the weights.

    If ``folder`` is a config.json itself, only that. Raises ValueError if the index of the weights
    is invalid.
    """
    folder_path = expand_home(folder)
    if folder_path.suffix == ".json":
        return (folder_path,)
    weights_file, index_file = (
        folder_path / "model.safetensors",
        folder_path / "model.safetensors.index.json",
    )
    if weights_file.is_file() or not index_file.is_file():
        return folder_path / "config.json", weights_file
    try:
        parts = sorted(
            set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values())
        )
        if outside := [part for part in parts if Path(part).name != part]:
            raise ValueError(f"{outside[0]} is not in it")
        return folder_path / "config.json", *(folder_path / part for part in parts)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"folder = {folder}: {index_file.name} names no files of weights"
        ) from error


def _load(
    folder: str, mapping: str, kind: str, settings: dict[str, Any], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network with the weights of the folder, and the loading report.

    mapping: transformers' name of the classes of such a ``kind`` of model; settings: of its config.
    The report lists the weights that are missing or have another shape. Raises ValueError if there
    is no such model.
    """
    config_file, *parts = required_files(folder)
    if torch.get_default_device().type == "meta":
        parts = []
    for file in (config_file, *parts):
        if not file.is_file():
            raise ValueError(
                f"folder = {folder}: has no {file.name}; give the folder of a model of Hugging "
                "Face on this machine"
            )
    library = _import_transformers()
    try:
        tree = {n: v for part in parts for n, v in weights.read(part, dtype=dtype).items()}
    except ValueError as error:
        raise ValueError(f"folder = {folder}: {error}") from error
    try:
        with _silence_library(library):
            model, report = _build_model(library, config_file, mapping, kind, settings, tree, dtype)
    except Exception as error:  # transformers and json raise many types
        raise ValueError(
            f"folder = {folder}: transformers cannot read it: {' '.join(str(error).split())}"
        ) from error
    return model, report if parts else {"missing_keys": (), "mismatched_keys": ()}


def _load_checked(
    folder: str, classes: int, mapping: str, kind: str, dtype: torch.dtype
) -> tuple[nn.Module, frozenset[str]]:
    """Return the classifier with the weights of the folder, and the names of those that are not in
    it.

    mapping, kind, dtype: as in ``_load``. Raises ValueError if the weights do not fit.
    """
    model, report = _load(folder, mapping, kind, {"num_labels": classes}, dtype)
    missing, mismatched = (
        set(report["missing_keys"]),
        {name for name, *_ in report["mismatched_keys"]},
    )
    encoder: Any = f"{model.base_model_prefix}."
    suspects = {n for n in missing if not n.startswith(f"{encoder}pooler.")} | mismatched
    if unfit := sorted(n for n in suspects if n.startswith(encoder)):
        others = f", and {len(unfit) - 1} more" if len(unfit) > 1 else ""
        raise ValueError(
            f"folder = {folder}: model.safetensors does not fit config.json: {unfit[0]} is "
            f"missing or of another shape{others}"
        )
    return model, frozenset(missing | mismatched)


def _build_model(
    library,
    config_file: Path,
    mapping: str,
    kind: str,
    settings: dict[str, Any],
    tree: Tree,
    dtype: torch.dtype,
) -> tuple[nn.Module, dict]:
    """Return the network of a config.json with the weights ``tree``, and the loading report."""
    config = library.AutoConfig.from_pretrained(
        config_file, local_files_only=True, trust_remote_code=False, **settings
    )
    model_class = getattr(library, mapping).get(type(config), None)
    if model_class is None:
        raise ValueError(f"it has no {kind} of the kind {config.model_type}")
    if torch.get_default_device().type == "meta":
        return model_class._from_config(config, attn_implementation="eager", dtype=dtype), {}
    return model_class.from_pretrained(
        None,
        config=config,
        state_dict=tree,
        attn_implementation="eager",  # vmap and the FLOP counter support its plain products
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )


def _check_causal(module: CausalHuggingFace, folder: str, length: int) -> None:
    """Raise ValueError unless the logits are those of transformers' own mask."""
    x = torch.arange(2 * length).remainder(module.tokens).view(2, length)
    with torch.no_grad():
        try:
            ours = module.eval()(x)
            if ours.is_meta:  # without values there is nothing to compare
                return
            theirs = module.model(input_ids=x, use_cache=False).logits[..., : module.tokens]
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"folder = {folder}: refuses texts of data.text.length = {length} tokens: {reason}"
            ) from error
    if ours.shape != theirs.shape or not _is_close(ours, theirs):
        raise ValueError(
            f"folder = {folder}: a {module.model.config.model_type} hides later tokens in a way of "
            "its own; gpt2, llama and gpt_neox do not"
        )


def _check_padding(module: HuggingFace, folder: str, length: int) -> None:
    """Raise ValueError unless two texts have the same logits as with transformers' own mask."""
    word = int(module.padding == 0)
    x = torch.arange(length).remainder(module.model.config.vocab_size)
    x = torch.where(x == module.padding, word, x).repeat(2, 1)
    x[1, (length + 1) // 2 :] = module.padding
    with torch.no_grad():
        try:
            ours = module.eval()(x)
            if ours.is_meta:  # without values there is nothing to compare
                return
            theirs = module.model(input_ids=x, attention_mask=(x != module.padding).long()).logits
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            message = (
                f"folder = {folder}: refuses texts of data.text.length = {length} tokens: {reason}"
            )
            raise ValueError(message) from error
    if ours.shape != theirs.shape or not _is_close(ours, theirs):
        raise ValueError(
            f"folder = {folder}: a {module.model.config.model_type} hides padding in a way of its "
            "own; roberta, bert and distilbert do not"
        )


def _is_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Return whether logits agree up to rounding in their type."""
    if ours.dtype == torch.float32:
        return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    error, size = ((ours - theirs).abs().max(), theirs.abs().max())
    return bool(error <= 0.05 * size)


@contextmanager
def _silence_library(library) -> Iterator[None]:
    """Suppress the library's progress bars and its report, which the caller checks."""
    logging = library.utils.logging
    level, has_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_progress_bar:
            logging.enable_progress_bar()


def _import_transformers():
    """Import transformers; raise ValueError if it is not installed."""
    with extra_imports("transformers", "hf"):
        import_torchvision()  # first: transformers would import it in another way, see there
        import transformers
    return transformers
