"""The samples of clients as stacked mini-batches, gathered on the device that trains.

A process holds the inputs once (see ``inputs.py``); clients are lists of indices into them. What a
batch of client k holds depends on (seed, k, round, epoch, position) and on nothing else.
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

from ..algorithm import Batch, held_out
from ..core.seeds import key, rng
from ..core.transfer import to_device
from .datasets import Data
from .inputs import Images, Texts, stored
from .partition import Split
from .transforms import draw

T = TypeVar("T", int, Tensor)
# numbers of an input that are gathered for several batches at once, and stay in a core's cache
_AT_ONCE = 2**17


@dataclass(frozen=True, eq=False)
class Epoch:
    """One pass of C clients over their own samples, order and augmentation fixed."""

    store: Images | Texts
    classes: int
    sizes: tuple[int, ...]  # [C] samples of each client
    lengths: Tensor  # [C] the same on the device
    rows: Tensor  # [C, n] indices into the store, n the largest size
    warps: dict[str, Tensor]  # name -> [C, n, ...] parameters of ``transforms.warp``
    relabel: Tensor | None  # [C] what is added to the labels
    noise: Tensor  # [C] int64 keys of this epoch
    counts: Tensor  # [C, classes] training samples of each class, float32
    beat: Callable[[], None]  # called for every batch

    def batch(self, count: int, first: int, width: int) -> Batch:
        """Positions first to first + width of the first ``count`` clients, stacked; waits for no
        device.

        x [count, width, ...] as the store reads it (images: float32, x[c] in channels_last); y
        [count, width]; key [count]; real [count, width] is False beyond a client's last sample, and
        None when nothing is padding.
        """
        self.beat()
        x, y = self._read(count, first, width, 1)
        return self._batch(x[0], y[0], self.noise[:count] + _mixed(first), first)

    def batches(self, firsts: range) -> Iterator[tuple[int, Batch]]:
        """For each of ``firsts``: how many clients still have data, the first so many, and their
        batch of up to ``firsts.step`` samples. Small ones are gathered several at once.
        """
        width, several = (
            firsts.step,
            max(1, _AT_ONCE // (len(self.sizes) * firsts.step * self.store.numbers)),
        )
        full = firsts[: max(0, (self.sizes[0] - firsts.start) // width)]
        for some in (full[at : at + several] for at in range(0, len(full), several)):
            count = self._longer(some[0])
            steps = torch.arange(some.start, some.stop, width, device=self.noise.device)
            noise = self.noise[:count] + _mixed(steps)[:, None]
            for first, *parts in zip(
                some, *self._read(count, some[0], width, len(some)), noise, strict=True
            ):
                self.beat()
                now = self._longer(first)
                yield (
                    now,
                    self._batch(
                        *(parts if now == count else (part[:now] for part in parts)), first
                    ),
                )
        for first in firsts[len(full) :]:
            yield (now := self._longer(first)), self.batch(now, first, self.sizes[0] - first)

    def _longer(self, first: int) -> int:
        """How many clients have more samples than ``first``."""
        return sum(size > first for size in self.sizes)

    def _read(self, count: int, first: int, width: int, steps: int) -> tuple[Tensor, Tensor]:
        """x and y of so many batches from ``first`` on, [steps, count, width, ...], each laid out
        like one alone.
        """

        def window(v: Tensor) -> Tensor:
            cut = _window(v, count, first, first + steps * width)
            return cut.unflatten(1, (steps, width)).transpose(0, 1).flatten(0, 1)

        read = self.store.read(
            window(self.rows), {name: window(v) for name, v in self.warps.items()}
        )
        x, y = (v.unflatten(0, (steps, count)) for v in read)
        if self.relabel is not None:
            y = (y + self.relabel[:count, None]) % self.classes
        return x, y

    def _batch(self, x: Tensor, y: Tensor, noise: Tensor, first: int) -> Batch:
        """The batch of these samples, which begin at ``first``."""
        (count, width), real = y.shape, None
        if min(self.sizes[:count]) < first + width:
            real = torch.arange(first, first + width, device=y.device) < self.lengths[:count, None]
        return Batch(x, y, real, noise, self.counts[:count])

    def cut(self, sizes: Sequence[int]) -> "Epoch":
        """The same pass, over only so many of each client's samples: the first in its order."""
        return replace(
            self, sizes=tuple(sizes), lengths=to_device(torch.tensor(sizes), self.lengths.device)
        )

    def each(self, fn: Callable[[Tensor], Tensor]) -> "Epoch":
        """The same pass with ``fn`` of every tensor but those of the store."""
        warps = {name: fn(value) for name, value in self.warps.items()}
        relabel = None if self.relabel is None else fn(self.relabel)
        own = {name: fn(getattr(self, name)) for name in ("lengths", "rows", "noise", "counts")}
        return replace(self, warps=warps, relabel=relabel, **own)

    def tensors(self) -> list[Tensor]:
        """Them, in the same order."""
        found: list[Tensor] = []
        self.each(lambda v: found.append(v) or v)
        return found


class Feed:
    """The samples of every client on one device, gathered by index; one copy of the data per
    process.

    ``shift`` makes client k's domain its own, in training and test alike: "rotate" turns its images
    by (k mod 4) * 90 degrees counter-clockwise, "labels" makes its class y the class (y + k mod 4)
    mod classes. ``beat`` is called for every batch, before it is gathered.
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
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.classes, self.shape = data.classes, data.shape
        if shift == "rotate" and (data.vocabulary or self.shape[1] != self.shape[2]):
            these = "texts" if data.vocabulary else "{} x {}".format(*self.shape[1:])
            raise ValueError(
                f"data.shift = rotate: needs square images, these are {these}; use labels"
            )
        self._seed, self._shift, self._device, self._beat = seed, shift, device, beat
        self._augment = data.augment if augment else ()
        self._train, self._test = (stored(data, side, device) for side in (data.train, data.test))
        self._hold(split)

    def _hold(self, split: Split) -> None:
        """The constructor's second half: whose samples are which."""
        self._train_rows = [torch.from_numpy(rows) for rows in split.train]  # shuffled on the host
        self._test_rows = [torch.from_numpy(rows).to(self._device) for rows in split.test]
        shifts = [k % 4 if self._shift == "labels" else 0 for k in range(len(split.train))]
        counts = np.stack(
            [np.roll(row, q) for row, q in zip(split.train_counts, shifts, strict=True)]
        )
        self._counts = torch.from_numpy(counts).float()

    def holding(self, split: Split) -> "Feed":
        """The same inputs, not copied, when the clients hold what ``split`` says; some may hold
        nothing.
        """
        other = copy(self)
        other._hold(split)
        return other

    def of_two(self, train: Sequence[int], test: Sequence[int]) -> "Feed":
        """The same inputs when two clients hold so many of the samples that anybody holds, over
        again where they are too few; no test samples where nobody holds any.
        """
        sides = []
        for rows, sizes in ((self._train_rows, train), (self._test_rows, test)):
            every = torch.cat([part.cpu() for part in rows]).numpy()
            ends = np.cumsum([0, *sizes])
            sides.append(
                [
                    np.resize(every, ends[-1])[a:b] if len(every) else every
                    for a, b in itertools.pairwise(ends)
                ]
            )
        counts = (np.zeros((2, self.classes), np.int64), np.zeros((2, self.classes), np.int64))
        for side, store, table in zip(sides, (self._train, self._test), counts, strict=True):
            labels = store.labels.cpu().numpy()
            for client, rows in enumerate(side):
                np.add.at(table[client], labels[rows], 1)
        return self.holding(Split(*map(tuple, sides), *counts))

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs and labels that this process holds on the device."""
        return sum(part.nbytes for side in (self._train, self._test) for part in side)

    def train_size(self, client: int) -> int:
        """How many training samples the client holds."""
        return len(self._train_rows[client])

    def test_size(self, client: int) -> int:
        """How many test samples the client holds."""
        return len(self._test_rows[client])

    def epoch(
        self,
        clients: Sequence[int],
        round_: int,
        epoch: int | str,
        fraction: float = 0.0,
        held: bool = False,
    ) -> Epoch:
        """The clients' training samples in the order, augmentation and noise of (round, epoch).

        fraction: of each client's samples that are held out; ``held``: these alone, without
        augmentation.
        """
        augment = () if held else self._augment
        rows, draws, noise = [], [], []
        for k in clients:
            at, mine = (k, round_, epoch), self._part(k, fraction, held)
            rows.append(mine[torch.randperm(len(mine), generator=rng(self._seed, "order", *at))])
            if augment:
                draws.append(
                    draw(augment, len(mine), rng(self._seed, "augment", *at), self.shape[1:])
                )
            noise.append(key(self._seed, "noise", *at))
        by_name = {name: [drawn[name] for drawn in draws] for name in augment}
        return self._pass(self._train, clients, rows, by_name, torch.tensor(noise))

    def _part(self, client: int, fraction: float, held: bool) -> Tensor:
        """The client's training samples without those held out, or these: the same in every round."""
        rows = self._train_rows[client]
        if not fraction:
            assert not held, "a phase on held-out samples, but Algorithm.held_out = 0"
            return rows
        order = torch.randperm(len(rows), generator=rng(self._seed, "held out", client))
        count = held_out(len(rows), fraction)
        return rows[(order[:count] if held else order[count:]).sort().values]

    def test(self, clients: Sequence[int], first: int, width: int) -> Batch:
        """Test samples first to first + width of the clients, stacked as by ``Epoch.batch``.

        In their own order, without augmentation; the keys address no noise.
        """
        rows = [self._test_rows[k] for k in clients]
        noise = torch.zeros(len(clients), dtype=torch.int64)
        return self._pass(self._test, clients, rows, {}, noise).batch(len(clients), first, width)

    def survey(self, clients: Sequence[int], whole: bool) -> Batch:
        """All training samples of the clients (or their first alone), in order, without
        augmentation.
        """
        rows = [self._train_rows[k] for k in clients]
        noise = torch.zeros(len(clients), dtype=torch.int64)
        width = max(map(len, rows)) if whole else 1
        return self._pass(self._train, clients, rows, {}, noise).batch(len(clients), 0, width)

    def _pass(
        self,
        store: Images | Texts,
        clients: Sequence[int],
        rows: list[Tensor],
        draws: dict[str, list[Tensor]],
        noise: Tensor,
    ) -> Epoch:
        sizes = tuple(map(len, rows))
        warps = {name: _stacked(values, self._device) for name, values in draws.items()}
        quarter = to_device(torch.tensor([k % 4 for k in clients]), self._device)  # [C]
        if self._shift == "rotate":
            warps["turn"] = (90.0 * quarter)[:, None].expand(-1, max(sizes))
        return Epoch(
            store=store,
            classes=self.classes,
            sizes=sizes,
            lengths=to_device(torch.tensor(sizes), self._device),
            rows=_stacked(rows, self._device),
            warps=warps,
            relabel=quarter if self._shift == "labels" else None,
            noise=to_device(noise, self._device),
            counts=to_device(torch.stack([self._counts[k] for k in clients]), self._device),
            beat=self._beat,
        )


def _stacked(values: list[Tensor], device: torch.device) -> Tensor:
    """Tensors [n_k, ...] of the clients as one [C, n, ...]; the padding is 0, a valid index."""
    return to_device(pad_sequence(values, batch_first=True), device)


def _window(stacked: Tensor, count: int, first: int, last: int) -> Tensor:
    """Columns first to last of the first ``count`` rows, with zeros beyond the end."""
    cut = stacked[:count, first:last]
    short = last - first - cut.shape[1]
    return torch.cat((cut, cut.new_zeros(count, short, *cut.shape[2:])), dim=1) if short else cut


def _mixed(first: T) -> T:
    """A number (or, of int64, several) to add to an epoch's key for the batch at ``first``; 0 keeps
    the epoch's own.

    An odd constant (Steele & Vigna 2021, LXM) spreads the steps over all keys, far from the golden
    gamma with which ``seeds.uniform`` counts: noise of two steps is never the same row moved along.
    """
    return first * (0xD1342543DE82EF95 - 2**64) & (2**62 - 1)
