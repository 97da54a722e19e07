"""Packing: several texts of a client in one input of a language model."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora_mpi.core.batch import Batch
from fedlora_mpi.core.losses import IGNORED, find_loss
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.vision import import_torchvision
from fedlora_mpi.data.datasets import Data
from fedlora_mpi.data.packing import first_fit, pack_texts
from fedlora_mpi.data.partition import Split
from fedlora_mpi.data.samples import Samples
from fedlora_mpi.models import zoo
from fedlora_mpi.models.packing import check_packing, unpack

LOSS = find_loss("next_token")
TOKENS, LENGTH = 13, 12


def texts_of(*sizes: int, address: str = "texts") -> Samples:
    """Texts of so many tokens with targets; some targets inside are missing, as in prompts."""
    x = torch.randint(0, TOKENS, (len(sizes), LENGTH), generator=rng(1, address, "x"))
    y = torch.randint(0, TOKENS, (len(sizes), LENGTH), generator=rng(1, address, "y"))
    y[torch.rand(y.shape, generator=rng(1, address, "prompts")) < 0.3] = IGNORED
    for text, size in enumerate(sizes):
        y[text, size:] = IGNORED
        if size:
            y[text, size - 1] = (text + size) % TOKENS
    return Samples(x.int(), y)


def data_of(train: Samples, test: Samples) -> Data:
    return Data(train, test, TOKENS, token_settings=(TOKENS, 7), targets="tokens")


def split_of(train: list[list[int]], test: list[list[int]]) -> Split:
    sides = [tuple(np.array(rows, np.int64) for rows in side) for side in (train, test)]
    return Split(*sides, *(np.array([[len(rows)] for rows in side]) for side in sides))


def pack(samples: Samples) -> Samples:
    """The packed rows of a single client."""
    everything = [[*range(len(samples.x))]]
    return pack_texts(data_of(samples, samples), split_of(everything, everything))[0].train


def read_rows(x: torch.Tensor, y: torch.Tensor) -> list[tuple]:
    """The texts of packed rows, (token ids, targets) up to the last target, as they stand there."""
    texts = []
    for ids, targets in zip(x.tolist(), y.tolist(), strict=True):
        marks = [place for place, token in enumerate(ids) if token >= TOKENS]
        for begin, end in zip(marks, [*marks[1:], len(ids)], strict=True):
            own = [token % TOKENS for token in ids[begin:end]], targets[begin:end]
            size = 1 + max((k for k, t in enumerate(own[1]) if t != IGNORED), default=0)
            texts.append((tuple(own[0][:size]), tuple(own[1][:size])))
    return texts


# Rows


@pytest.mark.parametrize("length, count", [(1, 5), (7, 40), (12, 83), (64, 200)])
def test_each_text_is_in_the_first_row_with_room_for_it(length, count):
    sizes = torch.randint(1, length + 1, (count,), generator=rng(1, "sizes", length)).numpy()
    room, expected = [], np.zeros(count, np.int64)
    for text in sorted(range(count), key=lambda k: -sizes[k]):
        row = next((k for k, left in enumerate(room) if left >= sizes[text]), len(room))
        if row == len(room):
            room.append(length)
        room[row] -= sizes[text]
        expected[text] = row
    assert first_fit(sizes, length).tolist() == expected.tolist()


def test_the_rows_of_a_client_hold_its_texts_each_once_with_their_targets():
    train, test = texts_of(5, 0, 12, 3, 4, 1, 7, 3, address="a"), texts_of(2, 6, 4, address="b")
    clients = [[3, 0, 7], [2, 1], [6, 4, 5]], [[1], [0, 2, 0], [2]]
    packed, split = pack_texts(data_of(train, test), split_of(*clients))
    for side, before, rows, texts in (
        (packed.train, train, split.train, clients[0]),
        (packed.test, test, split.test, clients[1]),
    ):
        assert torch.cat([torch.from_numpy(r) for r in rows]).tolist() == [*range(len(side.x))]
        assert side.x.dtype == torch.int32 and side.x.shape == side.y.shape == (len(side.x), LENGTH)
        for own_rows, own_texts in zip(rows, texts, strict=True):
            marked = before.x[own_texts].clone()
            marked[:, 0] += TOKENS
            expected = read_rows(marked, before.y[own_texts])
            assert sorted(read_rows(side.x[own_rows], side.y[own_rows])) == sorted(expected)
    assert [len(rows) for rows in split.train] == [1, 2, 1]  # 11, then 12 and 1, then 12 tokens
    assert split.train_counts.tolist() == [[1], [2], [1]]
    assert packed.train.x[0, 11] == 7  # padding


def test_the_last_token_of_a_text_does_not_predict_the_first_of_the_next():
    samples = texts_of(4, 3, 5)
    packed = pack(samples)
    assert len(packed.x) == 1
    (starts,) = torch.nonzero(packed.x[0] >= TOKENS, as_tuple=True)
    assert starts.tolist() == [0, 5, 9]
    targets = packed.y[0].tolist()
    assert targets[4] == samples.y[2, 4] and targets[8] == samples.y[0, 3]
    assert targets[11] == samples.y[1, 2]


# Networks


def gpt(packed: bool, **options):
    given = {"width": 8, "heads": 2, "layers": 2, "feedforward": 12} | options
    return zoo.build("gpt", given, TOKENS, (LENGTH,), 1, TOKENS, positions=LENGTH, packed=packed)


def hugging_face(folder: Path, family: str, packed: bool):
    import_torchvision()  # see there: transformers imports it
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=LENGTH, **sizes)
    else:
        config = transformers.LlamaConfig(
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=LENGTH,
            **sizes,
        )
    config.save_pretrained(folder)
    options = {"folder": str(folder / "config.json")}
    return zoo.build("hf", options, TOKENS, (LENGTH,), 1, TOKENS, positions=LENGTH, packed=packed)


@pytest.fixture(scope="module", params=["gpt", "gpt2", "llama"])
def networks(request, tmp_path_factory):
    """The same network for single texts and for packed rows, and weights of both; only read."""
    folder = tmp_path_factory.mktemp(request.param)
    make = gpt if request.param == "gpt" else partial(hugging_face, folder, request.param)
    plain, packed = make(packed=False), make(packed=True)
    tree = {
        n: v + 0.2 * torch.randn(v.shape, generator=rng(1, n)) for n, v in plain.initial.items()
    }
    return plain, packed, tree


def batch_of(samples: Samples) -> Batch:
    return Batch(samples.x.long(), samples.y, None, torch.tensor(0), torch.ones(1))


def loss_and_gradients(model, tree, batch):
    trained = {n: v.clone().requires_grad_() for n, v in tree.items() if model.role(n) != "stats"}
    loss = LOSS(model.eval_mode()(tree | trained, batch.x), batch)  # without dropout
    return loss.detach(), torch.autograd.grad(loss, [*trained.values()])


def test_packed_texts_have_the_loss_and_gradients_of_single_texts(networks):
    plain, packed, tree = networks
    samples = texts_of(5, 0, 12, 3, 4, 1, 7, 3, 2)
    rows = pack(samples)
    assert len(rows.x) < len(samples.x) / 2
    loss, gradients = loss_and_gradients(plain, tree, batch_of(samples))
    packed_loss, packed_gradients = loss_and_gradients(packed, tree, batch_of(rows))
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    close(packed_loss, loss)
    close(packed_gradients, gradients)


def test_texts_of_a_row_do_not_reach_each_other(networks):
    _, packed, tree = networks
    row = pack(texts_of(4, 3, 5)).x.long()
    logits = packed.eval_mode()(tree, row)
    for begin, end in ((0, 5), (5, 9), (9, 12)):
        for place in range(begin, end):
            changed = row.clone()
            changed[0, place] += 1 - 2 * (row[0, place] % TOKENS == TOKENS - 1).long()
            others = packed.eval_mode()(tree, changed)
            is_equal = (others == logits).all(-1)[0]
            assert is_equal[:place].all() and is_equal[end:].all() and not is_equal[place]


def test_a_row_without_a_mark_is_one_text(networks):
    plain, packed, tree = networks
    x = torch.randint(0, TOKENS, (3, LENGTH), generator=rng(1, "x"))
    assert torch.equal(packed.eval_mode()(tree, x), plain.eval_mode()(tree, x))


def test_a_stack_of_clients_reads_packed_rows(networks):
    _, packed, tree = networks
    rows = pack(texts_of(5, 0, 12, 3, 4, 1, 7, 3, 2)).x.long()
    clients = torch.stack([rows, rows.flip(0)])
    stacked = torch.vmap(packed.eval_mode(), in_dims=(None, 0))(tree, clients)
    alone = torch.stack([packed.eval_mode()(tree, x) for x in clients])
    torch.testing.assert_close(stacked, alone, rtol=1e-5, atol=1e-6)


def test_positions_begin_anew_with_each_text():
    x = torch.tensor([[TOKENS + 2, 3, TOKENS, TOKENS + 1, 5, 0]])
    ids, positions, visible = unpack(x, TOKENS)
    assert ids.tolist() == [[2, 3, 0, 1, 5, 0]] and positions.tolist() == [[0, 1, 0, 0, 1, 2]]
    assert visible[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]


# Mistakes


def sum_of_past(x: torch.Tensor, restarts: bool) -> torch.Tensor:
    """Logits of a network without weights: at each position the sum of the ids it sees."""
    texts = unpack(x, TOKENS)
    visible = texts.visible if restarts else torch.ones_like(texts.visible).tril()
    sums = (visible * texts.ids[:, None]).sum(-1, keepdim=True)
    return (sums * torch.arange(TOKENS)).float()


def test_a_network_that_cannot_read_packed_rows_is_refused():
    check_packing(partial(sum_of_past, restarts=True), TOKENS, LENGTH)
    check_packing(partial(sum_of_past, restarts=False), TOKENS, 1)  # one token a row
    with pytest.raises(ValueError, match="other logits than each has alone; unpack its inputs"):
        check_packing(partial(sum_of_past, restarts=False), TOKENS, LENGTH)
    with pytest.raises(ValueError, match=r"cannot read several texts in a row \(.*index out of"):
        check_packing(torch.nn.Embedding(TOKENS, TOKENS), TOKENS, LENGTH)
    with pytest.raises(ValueError, match="name = transformer: .*it reads one text at a time"):
        zoo.build("transformer", {}, 4, (LENGTH,), 1, TOKENS, packed=True)
