"""The settings of texts, and the vocabulary that turns texts into token ids.

The vocabulary is made from the training texts or read from a tokenizer file.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..core.bounds import bounded
from ..core.extras import extra_imports
from ..core.paths import expand_home

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPECIAL = ("[PAD]", "[UNK]")  # token ids 0 and 1
_PADDING = ("[PAD]", "<pad>")  # names of padding in a tokenizer file that does not declare it
_CHUNK = 4096  # texts that are encoded at once


@dataclass(frozen=True)
class Text:
    """The ``data.text`` block: the files, the length of a text, and the size of the vocabulary."""

    # maximum number of words, the most frequent ones; padding and the unknown word count as two
    vocabulary: int = 20000
    length: int = 64  # words of a text (tokens with a tokenizer); longer texts are cut
    # a tokenizer.json of Hugging Face, or its folder; replaces the vocabulary of words
    tokenizer: str | None = None
    train: str = "train.csv"  # in data.root; for ag_news in data.root/AG_NEWS
    test: str = "test.csv"
    label: str = "label"  # "csv" only: the column of the classes
    columns: tuple[str, ...] = ("text",)  # "csv" only: the columns of the text, joined by a space

    def __post_init__(self) -> None:
        bounded(self, vocabulary="[3, inf)", length="[1, inf)")
        if not self.columns:
            raise ValueError("columns = []: must name at least one column")
        if self.tokenizer and self.vocabulary != Text.vocabulary:
            raise ValueError(
                f"vocabulary = {self.vocabulary}: a tokenizer has its own; leave it out"
            )


@dataclass(frozen=True)
class Vocabulary:
    """Turns texts into token ids.

    ``json`` describes it completely, in the format of Hugging Face's tokenizers.
    """

    json: str

    @classmethod
    def from_texts(cls, texts: Sequence[str], settings: Text) -> "Vocabulary":
        """Return the vocabulary of ``texts``, a pure function of them and of ``settings``.

        A text is normalised to Unicode form NFKC and lower case, then split into words and runs of
        punctuation. Token id 0 is padding and 1 the unknown word. Words follow from 2 on by falling
        frequency, equally frequent ones in alphabetical order. Raises ValueError if the library
        tokenizers is not installed.
        """
        library = _import_tokenizers()
        trained = _word_level_tokenizer(library, {})
        trainer = library.trainers.WordLevelTrainer(
            vocab_size=settings.vocabulary, special_tokens=list(_SPECIAL), show_progress=False
        )
        trained.train_from_iterator(texts, trainer)
        # A new tokenizer without special tokens: else "[PAD]" in a text would become padding.
        tokenizer = _word_level_tokenizer(library, trained.get_vocab())
        tokenizer.enable_truncation(settings.length)
        tokenizer.enable_padding(length=settings.length, pad_id=0, pad_token=_SPECIAL[0])
        return cls(tokenizer.to_str())

    @classmethod
    def from_tokenizer(cls, settings: Text, needs_padding: bool = True) -> "Vocabulary":
        """Return the vocabulary of the file ``settings.tokenizer``: its ids and special tokens.

        Padding is the token that the file pads with, else its token [PAD] or <pad>; unless
        ``needs_padding``, else token 0. Raises
        ValueError if there is no such token, if the file is no tokenizer file, or if a text is too
        short for more than the special tokens.
        """
        library, setting = _import_tokenizers(), f"text.tokenizer = {settings.tokenizer}"
        assert settings.tokenizer is not None
        path = expand_home(settings.tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            tokenizer = library.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"{setting}: {path} cannot be read ({error.strerror}); give a tokenizer.json"
            ) from error
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"{setting}: {path} is no tokenizer.json ({' '.join(str(error).split())})"
            ) from error
        padding_token = next(
            (name for name in _PADDING if tokenizer.token_to_id(name) is not None), None
        )
        if not tokenizer.padding and padding_token is None and not needs_padding:
            padding_token = tokenizer.id_to_token(0)
        if not tokenizer.padding and padding_token is None:
            raise ValueError(
                f"{setting}: has no token for padding; there is neither {' nor '.join(_PADDING)}"
            )
        if settings.length <= (special_count := tokenizer.num_special_tokens_to_add(False)):
            needed = f"must be more than the {special_count} special tokens of every text"
            raise ValueError(f"text.length = {settings.length}: {needed}")
        padding = tokenizer.padding or {
            "pad_id": tokenizer.token_to_id(padding_token),
            "pad_token": padding_token,
        }
        truncation = tokenizer.truncation or {}
        padding_options = {
            key: padding[key]
            for key in ("direction", "pad_id", "pad_type_id", "pad_token")
            if key in padding
        }
        tokenizer.enable_truncation(settings.length, direction=truncation.get("direction", "right"))
        tokenizer.enable_padding(length=settings.length, **padding_options)
        return cls(tokenizer.to_str())

    @cached_property
    def size(self) -> int:
        """Number of token ids: all ids are below it."""
        return 1 + max(self.tokenizer.get_vocab().values())

    @property
    def padding(self) -> int:
        """Token id of padding."""
        padding = self.tokenizer.padding
        assert padding is not None
        return padding["pad_id"]

    @property
    def length(self) -> int:
        """Number of token ids of an encoded text, L."""
        truncation = self.tokenizer.truncation
        assert truncation is not None
        return truncation["max_length"]

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids of each text, [M, L] int32, cut or padded to L.

        Texts are cut and padded at the end, unless the tokenizer file says otherwise.
        """
        ids = np.zeros((len(texts), self.length), np.int32)
        for first in range(0, len(texts), _CHUNK):
            encodings = self.tokenizer.encode_batch_fast(list(texts[first : first + _CHUNK]))
            ids[first : first + len(encodings)] = [text.ids for text in encodings]
        return torch.from_numpy(ids)

    def digest(self) -> str:
        """Return the SHA-256 of ``json`` in hexadecimal."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer as an object of the library tokenizers."""
        return _import_tokenizers().Tokenizer.from_str(self.json)


def train_byte_pairs(texts: Sequence[str], tokens: int) -> str:
    """Return a tokenizer.json of ``tokens`` tokens for ``texts``: byte pairs, as GPT-2 has them.

    Texts are normalised to Unicode form NFKC and lower case. Every text can be written in its
    tokens, so there is no unknown word. Token id 0 is padding. A pure function of the arguments.
    Raises ValueError if the library tokenizers is not installed.
    """
    library = _import_tokenizers()
    bytes_ = library.pre_tokenizers.ByteLevel
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.normalizer = _normalizer(library)
    tokenizer.pre_tokenizer = bytes_(add_prefix_space=True)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=list(_SPECIAL[:1]),
        initial_alphabet=bytes_.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _word_level_tokenizer(library, words: dict[str, int]) -> "Tokenizer":
    """Return a tokenizer with these words and their token ids."""
    tokenizer = library.Tokenizer(library.models.WordLevel(words, unk_token=_SPECIAL[1]))
    tokenizer.normalizer = _normalizer(library)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    return tokenizer


def _normalizer(library):
    """Return a normaliser to Unicode form NFKC and lower case."""
    return library.normalizers.Sequence(
        [library.normalizers.NFKC(), library.normalizers.Lowercase()]
    )


def _import_tokenizers():
    """Import tokenizers with the submodules used here; raise ValueError if it is not installed."""
    with extra_imports("tokenizers", "text", "text"):
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    return tokenizers
