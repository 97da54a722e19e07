"""Random numbers of a user's network in training: functions of the run's key, not of a global
generator.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedlora_mpi.models.substitutes import Substitutes

X = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))


def drawn(function, key):
    """What a function gives under a key; it leaves torch's generator alone."""
    before = torch.get_rng_state()
    with Substitutes(None, torch.tensor(key)):
        found = function()
    assert torch.equal(before, torch.get_rng_state())
    return found


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("both", [False, True])
def test_dropout_between_the_levels_of_a_recurrent_layer(kind, both):
    torch.manual_seed(0)
    net = kind(5, 7, 3, dropout=0.5, bidirectional=both, batch_first=True)
    one, again, other = (drawn(lambda: net(X)[0], key) for key in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    net.dropout = 1e-9  # drops nothing, level by level
    ours, plain = drawn(lambda: net(X), 3), net.eval()(X)

    def flat(result):
        return [result[0], *(result[1] if isinstance(result[1], tuple) else result[1:])]

    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(flat(ours), flat(plain), strict=True)
    )


def test_packed_sequences_too():
    torch.manual_seed(0)
    net = nn.LSTM(5, 7, 2, dropout=0.5, batch_first=True)
    packed = nn.utils.rnn.pack_padded_sequence(X, [6, 5, 3, 1], batch_first=True)
    one, other = (drawn(lambda: net(packed)[0].data, key) for key in (3, 4))
    assert one.shape == (15, 7) and not torch.equal(one, other)


DRAWS = {
    "rand_like": (lambda: torch.rand_like(torch.zeros(4000, 5)), 0.5, 12**-0.5),
    "randn_like": (lambda: torch.randn_like(torch.zeros(4000, 5)), 0.0, 1.0),
    "rand": (lambda: torch.rand(20000, 1, dtype=torch.float64), 0.5, 12**-0.5),
    "randn": (lambda: torch.randn((100, 200)), 0.0, 1.0),
    "gumbel": (lambda: F.gumbel_softmax(torch.zeros(20000, 2), hard=True), 0.5, 0.5),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_have_the_distribution_that_torch_gives_them(name):
    function, mean, std = DRAWS[name]
    one, again, other = (drawn(function, key) for key in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other) and one.dtype == function().dtype
    assert (
        abs(float(one.double().mean()) - mean) < 0.03
        and abs(float(one.double().std()) - std) < 0.02
    )
