"""Texts for language models: each token's target is the next one.

``text_lm`` reads lines of plain text or JSON; ``instruct`` reads prompts with responses, of which
only the responses have targets.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..core.losses import IGNORED
from ..core.paths import expand_home
from .samples import Samples
from .texts import Text, Vocabulary


@dataclass(frozen=True)
class Language:
    """The ``data.language`` block: where a line of JSON has its texts and its client, and whether
    short texts share an input.
    """

    text: str = "text"  # text_lm: the key of the text
    prompt: str = "prompt"  # instruct: the keys of both parts
    response: str = "response"
    # instruct: the text around {prompt}, and around {response}, which else follows in a new line
    template: str = "{prompt}"
    client: str | None = None  # the key of the client, for partition.kind = given
    packing: bool = False  # several texts of a client in one input, see ``packing``

    def __post_init__(self) -> None:
        before, *after = self.template.split("{response}")
        if "{prompt}" not in self.template:
            raise ValueError(
                f"template = {self.template!r}: must contain {{prompt}}, where the prompt belongs"
            )
        if len(after) > 1 or "{prompt}" not in before:
            raise ValueError(
                f"template = {self.template!r}: {{response}} may stand there once, behind every "
                "{prompt}"
            )

    def write(self, prompt: str, response: str) -> tuple[str, int]:
        """Return a prompt with its response, and the first character that is learned."""
        before, found, after = self.template.partition("{response}")
        opening = before.replace("{prompt}", prompt) + ("" if found else "\n")
        return opening + response + after, len(opening)


class LanguageTexts(NamedTuple):
    """Texts of one file."""

    texts: list[str]
    starts: list[int]  # the first character of each text that a model learns to write
    clients: list[str] | None  # None: the file does not say

    @classmethod
    def whole(cls, texts: Sequence[str]) -> "LanguageTexts":
        """Texts that are learned from their first character on."""
        return cls(list(texts), [0] * len(texts), None)


def read_language(
    dataset: str, root: str, key: str, text: Text, language: Language
) -> LanguageTexts:
    """Read the file ``text.train`` or ``text.test`` (``key``) in ``root``.

    A file .jsonl has an object in each line, any other file a text in each line; empty lines do not
    count. Raises ValueError with the line for what does not fit.
    """
    name = getattr(text, key)
    setting = f"text.{key} = {name}"
    lines = _read_lines(setting, os.path.join(str(expand_home(root)), name))
    if not name.endswith(".jsonl"):
        if dataset == "instruct" or language.client:
            wanted = "dataset = instruct" if dataset == "instruct" else "language.client"
            raise ValueError(f"{setting}: {wanted} needs a file .jsonl, an object in each line")
        if language.text != Language.text:
            raise ValueError(
                f"language.text = {language.text}: {name} has a text in each line, and only a file "
                ".jsonl has keys; leave it out"
            )
        return LanguageTexts.whole([line for _, line in lines])
    texts, starts, clients = [], [], []
    for number, line in lines:
        location = f"{setting}: line {number}"
        row = _parse_object(location, line)
        if dataset == "instruct":
            prompt = _text_of(location, row, "prompt", language.prompt)
            response = _text_of(location, row, "response", language.response)
            whole, start = language.write(prompt, response)
            texts.append(whole)
            starts.append(start)
        else:
            texts.append(_text_of(location, row, "text", language.text))
            starts.append(0)
        if language.client:
            if language.client not in row:
                raise ValueError(f"{location}: has no key {language.client} (language.client)")
            clients.append(str(row[language.client]))
    return LanguageTexts(texts, starts, clients if language.client else None)


def language_samples(vocabulary: Vocabulary, side: LanguageTexts, setting: str) -> Samples:
    """Inputs [M, L] int32 and targets [M, L] int64 of texts of L + 1 tokens.

    A position has a target, the next token, if that token is no padding and belongs to what is
    learned. Raises ValueError if the tokenizer pads on the left, or if nothing has a target.
    """
    tokenizer = vocabulary.tokenizer
    assert tokenizer.padding is not None and tokenizer.truncation is not None
    if tokenizer.padding["direction"] != "right" or tokenizer.truncation["direction"] != "right":
        raise ValueError(
            "text.tokenizer: pads or cuts texts on the left; a language model needs the right, set "
            '"direction": "Right" in its tokenizer.json'
        )
    count, length = len(side.texts), vocabulary.length
    ids, counts = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
    for row, (encoding, start) in enumerate(
        zip(tokenizer.encode_batch(side.texts), side.starts, strict=True)
    ):
        ids[row] = encoding.ids
        begins = np.array([begin for begin, _ in encoding.offsets])
        is_special = np.array(encoding.special_tokens_mask, bool)
        is_real = np.array(encoding.attention_mask, bool)
        is_learned = is_real & ~is_special & (begins >= start)
        # a special token behind what is learned, such as the end of a text, is learned, too
        counts[row] = is_real & (is_learned | (is_special & (np.cumsum(is_learned) > 0)))
    targets = np.where(counts[:, 1:], ids[:, 1:], IGNORED)
    if not counts[:, 1:].any():
        raise ValueError(f"{setting}: no text has a token to predict; longer texts, or text.length")
    return Samples(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets).long())


def hint_at_targetless(samples: Samples, setting: str) -> tuple[str, ...]:
    """A hint if some texts have nothing to learn, such as a response behind the cut; else none."""
    without = int((samples.y == IGNORED).all(1).sum())
    if not without:
        return ()
    return (
        f"{setting}: {without} of {len(samples.y)} texts have no token to predict within "
        "text.length; each counts as a sample with the loss 0, so leave them out or raise "
        "text.length",
    )


def number_clients(
    train: LanguageTexts, test: LanguageTexts
) -> tuple[np.ndarray, np.ndarray] | None:
    """The clients of both files, numbered in the order of their names; None if they have none."""
    if train.clients is None or test.clients is None:
        return None
    names = sorted({*train.clients, *test.clients})
    numbers = {name: number for number, name in enumerate(names)}
    first, second = ([numbers[n] for n in side] for side in (train.clients, test.clients))
    return np.array(first, np.int64), np.array(second, np.int64)


def _read_lines(setting: str, path: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [(n, line.strip()) for n, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise ValueError(
            f"{setting}: cannot be read in {os.path.dirname(path)} ({error.strerror}); put it "
            "there or name another"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{setting}: is no text in UTF-8 ({error.reason}); save it so") from error
    if not lines:
        raise ValueError(f"{setting}: is empty")
    return lines


def _parse_object(location: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{location}: is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f'{location}: is no JSON object, such as {{"text": ...}}')
    return row


def _text_of(location: str, row: dict[str, Any], key: str, name: str) -> str:
    if name not in row:
        keys = ", ".join(map(str, row))
        raise ValueError(f"{location}: has no text {name} (language.{key}); it has {keys}")
    if not isinstance(row[name], str):
        raise ValueError(
            f"{location}: {name} (language.{key}) is no string, but {json.dumps(row[name])[:40]}"
        )
    return row[name]
