"""Gather the samples of clients as stacked mini-batches on the training device.

Each process holds one copy of the inputs (see ``inputs.py``); a client is a list of indices into
them. The content of a batch of client k depends only on (seed, k, round, epoch, position).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..algorithm import Batch, held_out_count
from ..core.seeds import derive_key, rng
from ..core.transfer import to_device
from .datasets import Data
from .inputs import AnyStore, Store, build_store, permute_inputs, rotate_inputs
from .partition import Split
from .samples import Samples
from .transforms import draw_parameters

T = TypeVar("T", int, Tensor)
# Small batches are gathered together up to this many numbers, which fit into the cache of a core.
_GATHER_NUMEL = 2**17
COMMON_SHIFTS = {"permute": permute_inputs, "rotate_inputs": rotate_inputs}


@dataclass(frozen=True, eq=False)
class Epoch:
    """One pass of C clients over their own samples, in a fixed order with fixed augmentation."""

    store: Store
    classes: int
    sizes: tuple[int, ...]  # [C] number of samples of each client
    lengths: Tensor  # [C] the same numbers on the device
    rows: Tensor  # [C, n] indices into the store; n is the largest size
    warps: dict[str, Tensor]  # name -> [C, n, ...] parameters of ``transforms.warp``
    relabel: Tensor | None  # [C] added to the labels modulo classes
    noise: Tensor  # [C] int64 noise keys of this epoch
    counts: Tensor  # [C, classes] number of training samples of each class, float32
    on_batch: Callable[[], None]  # called for every batch

    def batch(self, count: int, first: int, width: int) -> Batch:
        """Return positions first to first + width of the first ``count`` clients as one batch.

        x [count, width, ...] is as the store reads it (images: float32, x[c] in channels_last).
        y is [count, width], or [count, width, k] if the targets are no classes; key [count]. real
        [count, width] is False beyond a client's last sample and None if nothing is padding. The
        call does not wait for the device.
        """
        self.on_batch()
        x, y = self._read(count, first, width, 1)
        return self._batch(x[0], y[0], self.noise[:count] + _key_offset(first), first)

    def batches(self, starts: range) -> Iterator[tuple[int, Batch]]:
        """Yield (number of clients that still have data, their batch) for each of ``starts``.

        These are always the first clients. A batch has up to ``starts.step`` samples of each.
        Several small batches are read at once.
        """
        width, batches_per_read = (
            starts.step,
            max(1, _GATHER_NUMEL // (len(self.sizes) * starts.step * self.store.sample_numel)),
        )
        full_starts = starts[: max(0, (self.sizes[0] - starts.start) // width)]
        for block in (
            full_starts[at : at + batches_per_read]
            for at in range(0, len(full_starts), batches_per_read)
        ):
            count = self._count_longer(block[0])
            steps = torch.arange(block.start, block.stop, width, device=self.noise.device)
            noise = self.noise[:count] + _key_offset(steps)[:, None]
            for first, *parts in zip(
                block, *self._read(count, block[0], width, len(block)), noise, strict=True
            ):
                self.on_batch()
                active = self._count_longer(first)
                x, y, key = parts if active == count else (part[:active] for part in parts)
                yield active, self._batch(x, y, key, first)
        for first in starts[len(full_starts) :]:
            yield (
                (active := self._count_longer(first)),
                self.batch(active, first, self.sizes[0] - first),
            )

    def _count_longer(self, first: int) -> int:
        """Return how many clients have more than ``first`` samples."""
        return sum(size > first for size in self.sizes)

    def _read(self, count: int, first: int, width: int, steps: int) -> tuple[Tensor, Tensor]:
        """Return x and y of ``steps`` consecutive batches from ``first`` on.

        They are [steps, count, width, ...]. Each batch has the memory layout of a single one.
        """

        def window(v: Tensor) -> Tensor:
            cut = _slice_padded(v, count, first, first + steps * width)
            return cut.unflatten(1, (steps, width)).transpose(0, 1).flatten(0, 1)

        read = self.store.read(
            window(self.rows), {name: window(v) for name, v in self.warps.items()}
        )
        x, y = (v.unflatten(0, (steps, count)) for v in read)
        if self.relabel is not None:
            y = (y + self.relabel[:count, None]) % self.classes
        return x, y

    def _batch(self, x: Tensor, y: Tensor, noise: Tensor, first: int) -> Batch:
        """Return the batch of samples that begins at position ``first``."""
        (count, width), real = y.shape[:2], None
        if min(self.sizes[:count]) < first + width:
            real = torch.arange(first, first + width, device=y.device) < self.lengths[:count, None]
        return Batch(x, y, real, noise, self.counts[:count])

    def truncate(self, sizes: Sequence[int]) -> "Epoch":
        """Return the same pass over only the first ``sizes[c]`` samples of each client."""
        return replace(
            self, sizes=tuple(sizes), lengths=to_device(torch.tensor(sizes), self.lengths.device)
        )

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> "Epoch":
        """Return the same pass with ``fn`` applied to every tensor except those of the store."""
        warps = {name: fn(value) for name, value in self.warps.items()}
        relabel = None if self.relabel is None else fn(self.relabel)
        return replace(
            self,
            warps=warps,
            relabel=relabel,
            lengths=fn(self.lengths),
            rows=fn(self.rows),
            noise=fn(self.noise),
            counts=fn(self.counts),
        )

    def tensors(self) -> list[Tensor]:
        """Return the tensors that ``map_tensors`` maps, in the same order."""
        tensors: list[Tensor] = []

        def collect(v: Tensor) -> Tensor:
            tensors.append(v)
            return v

        self.map_tensors(collect)
        return tensors


class Feed:
    """The samples of all clients on one device, gathered by index from one copy per process.

    ``shift`` gives clients different domains, in training and in test: "rotate" turns the images of
    client k by (k mod 4) * 90 degrees counter-clockwise, "labels" turns its class y into the class
    (y + k mod 4) mod classes. "permute" and "rotate_inputs" change the inputs of all clients alike
    (see ``inputs``). ``on_batch`` is called for every batch.
    """

    def __init__(
        self,
        data: Data,
        split: Split,
        *,
        seed: int,
        shift: str,
        device: torch.device,
        augment: bool,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self.classes, self.shape = data.classes, data.shape
        self._class_labels, self._label_classes = data.class_labels, data.label_classes
        if shift == "rotate" and not (data.has_images and self.shape[1] == self.shape[2]):
            input_kind = " x ".join(map(str, self.shape[-2:])) if data.has_images else "numbers"
            input_kind = "texts" if data.tokens else input_kind
            other = "labels" if data.targets == "classes" else "none"
            raise ValueError(
                f"data.shift = rotate: needs square images, these are {input_kind}; use {other}"
            )
        self._seed, self._shift, self._device, self._on_batch = seed, shift, device, on_batch
        self._augment = data.augment if augment else ()
        if shift == "permute" and self._augment:
            raise ValueError("data.shift = permute: leaves nothing to augment; set augment: none")
        self._train, self._test = (
            _build_shifted(data, side, device, shift, seed) for side in (data.train, data.test)
        )
        self._assign_split(split)

    def _assign_split(self, split: Split) -> None:
        """Set the samples of each client; the second half of the constructor."""
        self._train_rows = [torch.from_numpy(rows) for rows in split.train]  # shuffled on the CPU
        self._test_rows = [torch.from_numpy(rows).to(self._device) for rows in split.test]
        shifts = [k % 4 if self._shift == "labels" else 0 for k in range(len(split.train))]
        counts = np.stack(
            [np.roll(row, q) for row, q in zip(split.train_counts, shifts, strict=True)]
        )
        self._counts = torch.from_numpy(counts).float()

    def with_split(self, split: Split) -> "Feed":
        """Return a feed of the same inputs, not copied, with another split.

        Clients of that split may hold no sample.
        """
        feed = copy(self)
        feed._assign_split(split)
        return feed

    def with_two_clients(self, train: Sequence[int], test: Sequence[int]) -> "Feed":
        """Return a feed of the same inputs with two clients of the given training and test sizes.

        Their samples come from those of all clients and repeat if there are too few. If there is no
        test sample at all, both clients have none.
        """
        sides = []
        for rows, sizes in ((self._train_rows, train), (self._test_rows, test)):
            all_rows = torch.cat([part.cpu() for part in rows]).numpy()
            ends = np.cumsum([0, *sizes])
            sides.append(
                [
                    np.resize(all_rows, ends[-1])[a:b] if len(all_rows) else all_rows
                    for a, b in itertools.pairwise(ends)
                ]
            )
        shape = 2, self._label_classes
        counts = (np.zeros(shape, np.int64), np.zeros(shape, np.int64))
        for side, labels, table in zip(sides, self._class_labels, counts, strict=True):
            for client, client_rows in enumerate(side):
                np.add.at(table[client], labels[client_rows], 1)
        return self.with_split(Split(tuple(sides[0]), tuple(sides[1]), *counts))

    @property
    def nbytes(self) -> int:
        """Number of bytes of the inputs and labels that this process holds on the device."""
        return sum(part.nbytes for side in (self._train, self._test) for part in side)

    def train_size(self, client: int) -> int:
        """Return how many training samples the client holds."""
        return len(self._train_rows[client])

    def test_size(self, client: int) -> int:
        """Return how many test samples the client holds."""
        return len(self._test_rows[client])

    def epoch(
        self,
        clients: Sequence[int],
        round_: int,
        epoch: int | str,
        fraction: float = 0.0,
        on_held_out: bool = False,
    ) -> Epoch:
        """Return the pass over the clients' training samples of (round, epoch).

        Order, augmentation and noise are functions of (seed, client, round, epoch). ``fraction`` of
        each client's samples is held out. With ``on_held_out`` the pass has only these, without
        augmentation; otherwise it has the others.
        """
        augment = () if on_held_out else self._augment
        rows, draws, noise = [], [], []
        for k in clients:
            address, samples = (k, round_, epoch), self._phase_samples(k, fraction, on_held_out)
            rows.append(
                samples[torch.randperm(len(samples), generator=rng(self._seed, "order", *address))]
            )
            if augment:
                draws.append(
                    draw_parameters(
                        augment, len(samples), rng(self._seed, "augment", *address), self.shape[1:]
                    )
                )
            noise.append(derive_key(self._seed, "noise", *address))
        by_name = {name: [drawn[name] for drawn in draws] for name in augment}
        return self._make_epoch(self._train, clients, rows, by_name, torch.tensor(noise))

    def _phase_samples(self, client: int, fraction: float, on_held_out: bool) -> Tensor:
        """Return the client's held-out training samples, or the others; the same in every round."""
        rows = self._train_rows[client]
        if not fraction:
            assert not on_held_out, "a phase on held-out samples, but Algorithm.held_out = 0"
            return rows
        order = torch.randperm(len(rows), generator=rng(self._seed, "held out", client))
        count = held_out_count(len(rows), fraction)
        return rows[(order[:count] if on_held_out else order[count:]).sort().values]

    def test_batch(self, clients: Sequence[int], first: int, width: int) -> Batch:
        """Return test samples first to first + width of the clients, stacked as in ``Epoch.batch``.

        They keep the order of the split and have no augmentation. No noise is drawn from their
        keys.
        """
        rows = [self._test_rows[k] for k in clients]
        noise = torch.zeros(len(clients), dtype=torch.int64)
        return self._make_epoch(self._test, clients, rows, {}, noise).batch(
            len(clients), first, width
        )

    def unshuffled_batch(self, clients: Sequence[int], all_samples: bool) -> Batch:
        """Return all training samples of the clients, or only the first of each.

        They keep the order of the split and have no augmentation. All keys are 0.
        """
        rows = [self._train_rows[k] for k in clients]
        noise = torch.zeros(len(clients), dtype=torch.int64)
        width = max(map(len, rows)) if all_samples else 1
        return self._make_epoch(self._train, clients, rows, {}, noise).batch(len(clients), 0, width)

    def _make_epoch(
        self,
        store: Store,
        clients: Sequence[int],
        rows: list[Tensor],
        draws: dict[str, list[Tensor]],
        noise: Tensor,
    ) -> Epoch:
        sizes = tuple(map(len, rows))
        warps = {name: _stack_padded(values, self._device) for name, values in draws.items()}
        quarter = to_device(torch.tensor([k % 4 for k in clients]), self._device)  # [C]
        if self._shift == "rotate":
            warps["turn"] = (90.0 * quarter)[:, None].expand(-1, max(sizes))
        return Epoch(
            store=store,
            classes=self.classes,
            sizes=sizes,
            lengths=to_device(torch.tensor(sizes), self._device),
            rows=_stack_padded(rows, self._device),
            warps=warps,
            relabel=quarter if self._shift == "labels" else None,
            noise=to_device(noise, self._device),
            counts=to_device(torch.stack([self._counts[k] for k in clients]), self._device),
            on_batch=self._on_batch,
        )


def _build_shifted(
    data: Data, samples: Samples, device: torch.device, shift: str, seed: int
) -> AnyStore:
    """Return ``samples`` on ``device``, changed by a ``shift`` that all clients have in common."""
    store = build_store(data, samples, device)
    if shift not in COMMON_SHIFTS:
        return store
    try:
        return COMMON_SHIFTS[shift](store, rng(seed, shift))
    except ValueError as error:
        raise ValueError(f"data.shift = {error}") from error


def _stack_padded(values: list[Tensor], device: torch.device) -> Tensor:
    """Stack the clients' tensors [n_k, ...] to one [C, n, ...], padded with 0 (a valid index)."""
    return to_device(pad_sequence(values, batch_first=True), device)


def _slice_padded(stacked: Tensor, count: int, first: int, last: int) -> Tensor:
    """Return columns first to last of the first ``count`` rows, with zeros beyond the end."""
    cut = stacked[:count, first:last]
    short = last - first - cut.shape[1]
    return torch.cat((cut, cut.new_zeros(count, short, *cut.shape[2:])), dim=1) if short else cut


def _key_offset(first: T) -> T:
    """Return what is added to the epoch's key for the batch at ``first``; 0 for ``first`` = 0.

    ``first`` is an integer or an int64 tensor. The offset is a multiple of an odd constant (Steele
    & Vigna 2021, LXM), modulo 2**62, which spreads the steps over all keys. ``seeds.uniform``
    counts with a very different constant (the golden gamma), so the noise of one step is never a
    shifted copy of that of another step.
    """
    return first * (0xD1342543DE82EF95 - 2**64) & (2**62 - 1)
