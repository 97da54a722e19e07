"""Pooling of a stack: the same maxima and gradients as torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from fedlora_mpi.models.pooling import MaxPool2x2, MaxPoolMode


def images(*shape: int) -> torch.Tensor:
    """Few different numbers, so that many are equal."""
    return (
        torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(1))
        .double()
        .requires_grad_()
    )


@pytest.mark.parametrize("shape", [(3, 2, 4, 6), (2, 5, 8, 2), (1, 1, 2, 2), (3, 8, 8)])
def test_maxima_and_gradients_are_those_of_torch(shape):
    x = images(*shape)
    y, *_ = MaxPool2x2.apply(x)
    assert torch.equal(y, F.max_pool2d(x, 2))
    g = torch.randn_like(y)
    assert torch.equal(
        torch.autograd.grad(y, x, g)[0], torch.autograd.grad(F.max_pool2d(x, 2), x, g)[0]
    )
    assert torch.autograd.gradgradcheck(
        lambda v: MaxPool2x2.apply(v)[0], torch.randn(2, 2, 4, 4).double().requires_grad_()
    )


def test_what_is_no_number_stays_none():
    for at in range(4):
        x = torch.zeros(1, 1, 2, 2)
        x.view(-1)[at] = float("nan")
        assert MaxPool2x2.apply(x)[0].isnan().all()


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d((2, 2), [2, 2]),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(3),
        nn.MaxPool2d(2, 1),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d((2, 1)),
    ],
)
@pytest.mark.parametrize("sides", [(6, 4), (5, 6), (6, 7)])
def test_every_pool_of_a_stack_is_torchs(layer, sides, monkeypatch):
    x, met = images(4, 3, 2, *sides), []
    monkeypatch.setattr(
        MaxPool2x2, "apply", lambda v, own=MaxPool2x2.apply: met.append(v.shape) or own(v)
    )
    with MaxPoolMode():
        stacked = vmap(layer)(x)
    assert torch.equal(stacked, torch.stack([layer(one) for one in x]))
    simple = (
        layer.kernel_size in (2, (2, 2))
        and layer.padding == 0
        and layer.stride != 1
        and not layer.ceil_mode
    )
    # of the clients one by one, then of all at once
    assert len(met) == (2 if simple and sides == (6, 4) else 0)


@pytest.mark.parametrize("least, met", [(2 * 6 * 4 * 3, True), (2 * 6 * 4 * 3 + 1, False)])
def test_small_images_are_pooled_by_torch(least, met, monkeypatch):
    x, own, calls = images(4, 3, 2, 6, 4), MaxPool2x2.apply, []
    monkeypatch.setattr(MaxPool2x2, "apply", lambda v: calls.append(v.shape) or own(v))
    with MaxPoolMode(least):
        vmap(nn.MaxPool2d(2))(x)
    assert len(calls) == 2 * met  # by the numbers of one client, not of the stack


def test_gradients_of_a_stack_are_torchs():
    x, w = images(4, 3, 2, 6, 4), torch.randn(4, 3, 2, 3, 2).double()

    def pooled():
        return (vmap(nn.MaxPool2d(2))(x) * w).sum()

    with MaxPoolMode():
        loss = pooled()
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.autograd.grad(pooled(), x)[0])
