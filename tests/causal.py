"""Tiny causal language models of Hugging Face, saved in a folder."""

import json
from pathlib import Path

import pytest

from fedlora_mpi.core.seeds import isolate_rng
from fedlora_mpi.core.vision import import_torchvision

SIZES = {"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SIZES |= {"initializer_range": 0.3}  # far enough from zero for a low-rank part to be seen
LAYERS = {"hidden_size": 8, "num_hidden_layers": 1}
LAYERS |= {"num_attention_heads": 2, "max_position_embeddings": 16}


def small_model(folder: Path, family: str) -> Path:
    """The folder of a random GPT-2 (tied, its layers Conv1D), OPT (tied) or Llama (untied)."""
    import_torchvision()  # see there: transformers imports it
    transformers = pytest.importorskip("transformers")
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, **SIZES)
    elif family == "opt":
        config = transformers.OPTConfig(ffn_dim=12, word_embed_proj_dim=8, **LAYERS, **SIZES)
    else:
        heads = {"num_key_value_heads": 1}
        config = transformers.LlamaConfig(intermediate_size=12, **heads, **LAYERS, **SIZES)
    with isolate_rng(1, family):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / family)
    return folder / family


def save_tokenizer(folder: Path, words: list[str]) -> None:
    """Write a tokenizer.json that knows these words, padding and an unknown word."""
    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *words))}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    special = [
        {"id": n, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for n, token in enumerate(("[PAD]", "[UNK]"))
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
