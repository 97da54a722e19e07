"""A sequence classifier of Hugging Face's transformers, from a folder on this machine, as a network of token ids.

Nothing is fetched and no code of the folder runs. Leaves are named as in transformers, under ``model.``.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..vision import torchvision


class HuggingFace(nn.Module):
    """``model``: a ``...ForSequenceClassification``; ``fresh``: those of its parameters that its folder has not."""

    PREFIX = "model."  # in front of transformers' names

    def __init__(self, model: nn.Module, fresh: frozenset[str]) -> None:
        super().__init__()
        self.model, self.fresh, self.padding = model, fresh, model.config.pad_token_id

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, L] token ids -> logits [B, classes]. Nobody looks at padding."""
        # Ready to be added to the scores: a plain mask is asked whether it hides anything, which a stack of clients
        # cannot answer.
        hidden = torch.zeros(x.shape, device=x.device).masked_fill(x == self.padding, torch.finfo(torch.float32).min)
        return self.model(input_ids=x, attention_mask=hidden[:, None, None]).logits  # [B, 1, 1, L]

    @property
    def folder(self) -> Path:
        """Where it comes from, absolute."""
        return Path(self.model.name_or_path).absolute()

    def is_above_encoder(self, name: str) -> bool:
        """Whether a leaf, under transformers' name, belongs to what classifies and not to the pre-trained encoder."""
        return not name.startswith(f"{self.model.base_model_prefix}.")


def classifier(folder: str, classes: int, length: int, tokens: int, padding: int) -> HuggingFace:
    """The model in ``folder`` for texts of ``length`` tokens below ``tokens``, float32.

    What classifies is new, from torch's global generator, where the folder has none or one for other classes; so
    is a pooler that the folder has not. Raises ValueError when anything else does not fit, when the data's tokens
    are not the model's, or when it reads a mask differently from here (a decoder, for instance).
    """
    home = Path(folder).expanduser()
    for needed in ("config.json", "model.safetensors"):
        if not (home / needed).is_file() and not (home / f"{needed}.index.json").is_file():
            raise ValueError(
                f"folder = {folder}: has no {needed}; give the folder of a model of Hugging Face on this machine"
            )
    module = _loaded(home, folder, classes)
    config = module.model.config
    if module.padding is None:
        raise ValueError(f"folder = {folder}: its config.json has no pad_token_id; {config.model_type} cannot be used")
    if tokens > config.vocab_size or padding != module.padding:
        raise ValueError(
            f"folder = {folder}: knows {config.vocab_size} tokens, {module.padding} for padding; data.text.tokenizer has "
            f"{tokens}, {padding} for padding; give the tokenizer of this model"
        )
    _try(module, folder, length)
    return module


def digest(folder: str) -> str:
    """SHA-256 in hexadecimal of the weights in ``folder``; reads them whole."""
    total = hashlib.sha256()
    for path in sorted(Path(folder).expanduser().glob("*.safetensors")):
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _loaded(home: Path, folder: str, classes: int) -> HuggingFace:
    """The module, its weights those of the folder; checked."""
    library = _transformers()
    try:
        with _quiet(library):
            model, report = library.AutoModelForSequenceClassification.from_pretrained(
                home,
                num_labels=classes,
                attn_implementation="eager",  # plain products, which vmap batches and the FLOP counter sees
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # of many kinds: those of transformers, safetensors, json
        raise ValueError(f"folder = {folder}: transformers cannot read it: {' '.join(str(error).split())}") from error
    missing, other = set(report["missing_keys"]), {name for name, *_ in report["mismatched_keys"]}
    module = HuggingFace(model, frozenset(missing | other))
    pooler = f"{model.base_model_prefix}.pooler."
    wrong = {n for n in missing if not n.startswith(pooler)} | other
    if wrong := sorted(n for n in wrong if not module.is_above_encoder(n)):
        raise ValueError(
            f"folder = {folder}: model.safetensors does not fit config.json: {wrong[0]} is missing or of another shape"
            f"{f', and {len(wrong) - 1} more' * (len(wrong) > 1)}"
        )
    return module


def _try(module: HuggingFace, folder: str, length: int) -> None:
    """Raise ValueError unless two texts give what transformers gives with its own mask."""
    word = int(module.padding == 0)
    x = torch.arange(length).remainder(module.model.config.vocab_size)
    x = torch.where(x == module.padding, word, x).repeat(2, 1)
    x[1, (length + 1) // 2 :] = module.padding
    with torch.no_grad():
        try:
            ours = module.eval()(x)
            theirs = module.model(input_ids=x, attention_mask=(x != module.padding).long()).logits
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"folder = {folder}: refuses texts of data.text.length = {length} tokens: {' '.join(str(error).split())}"
            ) from error
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"folder = {folder}: a {module.model.config.model_type} hides padding in a way of its own; roberta, bert and "
            "distilbert do not"
        )


@contextmanager
def _quiet(library) -> Iterator[None]:
    """Without its progress bars and its report, which is checked here."""
    logging = library.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _transformers():
    """The library."""
    try:
        torchvision()  # which it would import in its own way, see there
        import transformers
    except ImportError as error:
        raise ValueError("transformers is not installed; pip install 'fedlora-mpi[hf]'") from error
    return transformers
