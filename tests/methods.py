"""What each method needs beside ``algorithm=NAME`` to learn in the tiny experiment."""

from runs import TESTS

from fedlora_mpi import algorithms
from fedlora_mpi.components.lora import FineTuning

# The tiny experiment on words, with a small language model.
WORDS = f"""data={{
    dataset: csv, root: {TESTS / "words"}, text: {{label: topic, columns: [body], length: 6}},
    partition: {{kind: dirichlet_class, alpha: 0.7, clients: 7, minimum: 5}}}}"""
GPT = (
    WORDS,
    "model={name: gpt, width: 8, heads: 2, layers: 1, feedforward: 12, loss: next_token}",
)
LORA_METHODS = tuple(
    name
    for name in algorithms.algorithm_names()
    if issubclass(algorithms.find_algorithm(name), FineTuning)
)
# They need no class of a sample.
CAUSAL_METHODS = tuple(
    name for name in LORA_METHODS if not algorithms.find_algorithm(name).needs_class_labels
)

# Settings that the tiny experiment needs for a method: its default does not fit three epochs with
# momentum.
SETTINGS = {
    "aggregation_broadcast": ("train.lr=0.02",),  # as fedex_lora
    "fedavg_ft": ("algorithm.ft_epochs=1", "train.lr=0.01"),  # by 0.05 it is right at once
    "depositum_like": ("topology=ring", "train.momentum=0", "train.lr=0.1"),
    "dpsgd": ("topology=ring",),
    # the entropy of what is taught counts in the loss, from round 2 on
    "fd": ("algorithm.gamma=0.1",),
    "fed_talora": ("train.lr=0.02",),  # as fedex_lora
    "fedapen": ("algorithm.small=user_parts:with_norm",),
    "fedex_lora": ("train.lr=0.02",),  # W and factors that all move: by 0.05 the cnn diverges
    "fedglomo": ("train.momentum=0", "train.lr=0.1"),
    "fedhl": ("train.lr=0.02",),  # as fedex_lora
    # the networks of the tiny experiment have no tokens; gamma as for fd
    "fedhpl_like": ("algorithm.prompts=0", "algorithm.gamma=0.1", "train.lr=0.3"),
    "fedit": ("train.lr=0.02",),  # as fedex_lora
    # its division by D makes it steep
    "fedkd": ("algorithm.small=user_parts:with_norm", "train.lr=0.02"),
    "fedrep": ("algorithm.head_epochs=1",),
    "fedsa_lora": ("train.lr=0.02",),  # as fedex_lora
    "flexlora": ("train.lr=0.02",),  # as fedex_lora
    "fml": ("algorithm.small=user_parts:with_norm",),
    # by 0.05 a client now and then diverges, and its norm takes all the weight
    "hetlora": ("train.lr=0.02",),
    "moon": ("algorithm.mu=0.1",),
    "pfedme": ("train.momentum=0", "train.lr=0.1"),
    "raflora": ("train.lr=0.02",),  # as fedex_lora
    # by 0.05 a language model swings, and the rounding of a CPU decides where it ends
    "rolora": ("train.lr=0.02",),
    "scaffold": ("train.momentum=0", "train.lr=0.1"),
}

# Fields that a method needs beside its defaults on networks that have no tokens.
FIELDS = {"fedhpl_like": {"prompts": 0}}


def overrides_for(name: str) -> tuple[str, ...]:
    """The overrides that choose an algorithm."""
    return f"algorithm={name}", *SETTINGS.get(name, ())
