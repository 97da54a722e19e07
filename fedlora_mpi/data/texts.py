"""The settings of texts, and the vocabulary, of the training texts or given, that turns them into
numbers.
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
from ..core.paths import expand_home

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPECIAL = ("[PAD]", "[UNK]")  # the numbers 0 and 1
_PADDING = ("[PAD]", "<pad>")  # its names in a tokenizer that does not say which it pads with
_CHUNK = 4096  # texts that are encoded at a time


@dataclass(frozen=True)
class Text:
    """The ``data.text`` block: the files, the length of a text, and how many words are known."""

    # at most so many words, the most frequent; padding and the unknown word are two
    vocabulary: int = 20000
    length: int = 64  # words of a text, with a tokenizer its tokens; what is longer is cut
    # a tokenizer.json of Hugging Face, or its folder, in the place of the words
    tokenizer: str | None = None
    train: str = "train.csv"  # in data.root, for ag_news in data.root/AG_NEWS
    test: str = "test.csv"
    label: str = "label"  # "csv" only: the name of the column of the classes
    columns: tuple[str, ...] = ("text",)  # "csv" only: those of the text, joined by a space

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
    """What turns a text into numbers: all of it is in ``json``, in the format of Hugging Face's
    tokenizers.
    """

    json: str

    @classmethod
    def from_texts(cls, texts: Sequence[str], settings: Text) -> "Vocabulary":
        """That of ``texts``: a pure function of them.

        A text becomes its words and its runs of punctuation in lower case, under Unicode's
        compatibility form NFKC. 0 is padding, 1 the unknown word, from 2 on the words by falling
        frequency, those equally frequent in alphabetical order. Raises ValueError when the library
        is not installed.
        """
        library = _import_tokenizers()
        trained = _word_level_tokenizer(library, {})
        trainer = library.trainers.WordLevelTrainer(
            vocab_size=settings.vocabulary, special_tokens=list(_SPECIAL), show_progress=False
        )
        trained.train_from_iterator(texts, trainer)
        # Anew, or "[PAD]" in a text would be taken for padding.
        tokenizer = _word_level_tokenizer(library, trained.get_vocab())
        tokenizer.enable_truncation(settings.length)
        tokenizer.enable_padding(length=settings.length, pad_id=0, pad_token=_SPECIAL[0])
        return cls(tokenizer.to_str())

    @classmethod
    def from_tokenizer(cls, settings: Text) -> "Vocabulary":
        """That of the file ``settings.tokenizer``, with its numbers and its special tokens.

        Padding is what the file pads with, else its token [PAD] or <pad>. Raises ValueError when
        there is none, or the file is none, or its special tokens alone fill a text.
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
        """All numbers are below it."""
        return 1 + max(self.tokenizer.get_vocab().values())

    @property
    def padding(self) -> int:
        """The number behind the end of a text."""
        padding = self.tokenizer.padding
        assert padding is not None
        return padding["pad_id"]

    @property
    def length(self) -> int:
        """Numbers of a text, L."""
        truncation = self.tokenizer.truncation
        assert truncation is not None
        return truncation["max_length"]

    def encode(self, texts: Sequence[str]) -> Tensor:
        """The first L numbers of each text, [M, L] int32; padding behind its end."""
        ids = np.zeros((len(texts), self.length), np.int32)
        for first in range(0, len(texts), _CHUNK):
            encodings = self.tokenizer.encode_batch_fast(list(texts[first : first + _CHUNK]))
            ids[first : first + len(encodings)] = [text.ids for text in encodings]
        return torch.from_numpy(ids)

    def digest(self) -> str:
        """SHA-256 in hexadecimal."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The library's object."""
        return _import_tokenizers().Tokenizer.from_str(self.json)


def _word_level_tokenizer(library, words: dict[str, int]) -> "Tokenizer":
    """A tokenizer with these words."""
    tokenizer = library.Tokenizer(library.models.WordLevel(words, unk_token=_SPECIAL[1]))
    tokenizer.normalizer = library.normalizers.Sequence(
        [library.normalizers.NFKC(), library.normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    return tokenizer


def _import_tokenizers():
    """The library, with the parts that are used."""
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ValueError(
            "text: tokenizers is not installed; pip install 'fedlora-mpi[text]'"
        ) from error
    return tokenizers
