"""FedLC and FedGA: FedAvg with a loss that knows how often each class occurs."""

import pytest
import small
import torch
from tiers import STACK_FIRST

from fedlora_mpi.algorithm import Batch, Variables
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedga import FedGA, calibrated_targets
from fedlora_mpi.algorithms.fedlc import FedLC
from fedlora_mpi.core.batch import cross_entropy
from fedlora_mpi.core.seeds import rng

Y = (0, 0, 0, 1, 1, 2)  # no sample of class 3
COUNTS = (9.0, 4.0, 1.0, 0.0)
LOGITS = torch.randn(len(Y), 4, generator=rng(1, "logits"), dtype=torch.float64)
VARIANTS = [FedLC(tau=0.75), FedLC(tau=0.75, denominator="others"), FedGA(), FedGA(variant="exact")]
IDS = ["fedlc-all", "fedlc-others", "fedga-code", "fedga-exact"]
every_variant = pytest.mark.parametrize("algorithm", VARIANTS, ids=IDS)


class Identity:
    """A network whose outputs are its inputs."""

    leaves: dict = {}

    def __call__(self, tree, x):
        return x


def batch(logits=LOGITS, y=Y, real=None, counts=COUNTS):
    real = None if real is None else torch.tensor(real)
    return Batch(logits, torch.tensor(y), real, torch.tensor(0), torch.tensor(counts))


def value_and_slope(algorithm, data):
    """(loss [], its gradient in the logits [B, classes])."""
    z = data.x.clone().requires_grad_()
    value = algorithm.loss(Identity())(Variables({}, {}), Variables({}, {}), data._replace(x=z))
    return value.detach(), torch.autograd.grad(value, z)[0]


@every_variant
def test_neither_the_order_of_a_batch_nor_its_padding_matters(algorithm):
    value, slope = value_and_slope(algorithm, batch())
    order = [4, 2, 0, 5, 1, 3]
    permuted, slope_permuted = value_and_slope(
        algorithm, batch(LOGITS[order], [Y[k] for k in order])
    )
    assert torch.allclose(permuted, value, rtol=1e-12)
    assert torch.allclose(slope_permuted, slope[order], rtol=1e-12)
    padding = torch.full((2, 4), torch.inf)
    padded, slope_padded = value_and_slope(
        algorithm,
        batch(torch.cat([LOGITS, padding.double()]), (*Y, 3, 0), real=[True] * 6 + [False] * 2),
    )
    assert torch.allclose(padded, value, rtol=1e-12)
    assert torch.allclose(slope_padded[:6], slope, rtol=1e-12) and not slope_padded[6:].any()


@pytest.mark.parametrize("algorithm", VARIANTS[:2], ids=IDS[:2])
def test_the_gradient_of_fedlc_is_that_of_finite_differences(algorithm):
    def loss(z):
        return algorithm.loss(Identity())(Variables({}, {}), Variables({}, {}), batch(z))

    assert torch.autograd.gradcheck(loss, LOGITS.clone().requires_grad_())


@every_variant
def test_loop_and_stack_agree(algorithm):
    loop, stack = (
        small.final_state(algorithm, "bn_net", stacked=stacked).shared for stacked in (False, True)
    )
    small.assert_near(stack, loop)


# FedLC


@STACK_FIRST
def test_fedlc_without_tau_is_fedavg(stacked):
    ends = [
        small.final_state(algorithm, "bn_net", stacked=stacked, participation=0.6).shared
        for algorithm in (FedLC(tau=0.0), FedAvg())
    ]
    assert small.trees_equal(*ends)


def test_fedlc_with_equal_counts_is_cross_entropy():
    data = batch(counts=(5.0, 5.0, 5.0, 5.0))
    value, slope = value_and_slope(FedLC(tau=3.0), data)
    z = LOGITS.clone().requires_grad_()
    expected = cross_entropy(z, data)
    assert torch.allclose(value, expected, rtol=1e-7)
    assert torch.allclose(slope, torch.autograd.grad(expected, z)[0], atol=1e-7)


def test_fedlc_lowers_the_logit_of_a_class_of_few_samples():
    """Counts 1 and 16 give shifts 1 and 1 / 2: the rarer class needs a margin of 1 / 2."""
    z = FedLC(tau=1.0).calibrate(torch.zeros(1, 2), torch.tensor([1.0, 16.0]))
    assert z.tolist() == [[-1.0, -0.5]]


@pytest.mark.parametrize("algorithm", VARIANTS[:2], ids=IDS[:2])
def test_a_class_that_the_client_lacks_gets_no_gradient_from_fedlc(algorithm):
    value, slope = value_and_slope(algorithm, batch(LOGITS.float()))
    assert torch.isfinite(value) and not slope[:, 3].any() and slope[:, :3].all()


def test_the_sum_of_others_leaves_out_the_true_class():
    data = batch()
    z = FedLC(tau=0.75).calibrate(LOGITS, data.counts)
    q_y = z.softmax(1).gather(1, data.y[:, None])
    value, _ = value_and_slope(FedLC(tau=0.75, denominator="others"), data)
    assert torch.allclose(value, -(q_y / (1 - q_y)).log().mean(), rtol=1e-12)


@pytest.mark.parametrize("algorithm", VARIANTS[:2], ids=IDS[:2])
def test_fedlc_has_nothing_to_learn_from_one_class(algorithm):
    value, slope = value_and_slope(algorithm, batch(y=[1] * 6, counts=(0.0, 6.0, 0.0, 0.0)))
    assert value == 0 and not slope.any()


def test_fedlc_refuses_a_negative_tau():
    with pytest.raises(ValueError, match="tau = -1: must be a number of at least 0"):
        FedLC(tau=-1)


# FedGA


@pytest.mark.parametrize("variant", ["code", "exact"])
def test_fedga_on_a_balanced_batch_is_cross_entropy(variant):
    data = batch(LOGITS[:4], (2, 0, 3, 1))
    value, slope = value_and_slope(FedGA(variant=variant), data)
    z = data.x.clone().requires_grad_()
    expected = cross_entropy(z, data)
    assert value == pytest.approx(expected.item(), rel=1e-14)
    assert torch.allclose(slope, torch.autograd.grad(expected, z)[0], atol=1e-14)


def class_shares():
    """q [B, classes], n_k / n_y [B, classes] and the index of a sample's own class [B, 1]."""
    y = torch.tensor(Y)
    n = torch.bincount(y, minlength=4).double()
    return LOGITS.softmax(1), n / n[y][:, None], y[:, None]


def test_the_gradients_of_fedga_are_a_and_a_plus_s_times_q():
    q, ratio, y = class_shares()
    a = (q * ratio).scatter(1, y, q.gather(1, y) - 1)
    S = (q * (1 - ratio)).sum(1, keepdim=True)  # its term k = y is zero
    _, exact = value_and_slope(FedGA(variant="exact"), batch())
    _, code = value_and_slope(FedGA(), batch())
    assert torch.allclose(exact, a / len(Y), rtol=1e-12)
    assert torch.allclose(code, (a + S * q) / len(Y), rtol=1e-12)
    assert not exact[:, 3].any() and code[:, 3].all()  # the class that is not in the batch


def test_gradients_of_a_class_balance_as_its_errors_do():
    y, q = torch.tensor(Y), LOGITS.softmax(1)
    _, a = value_and_slope(FedGA(variant="exact"), batch())
    for c in range(3):
        misses = (1 - q[y == c, c]).mean()
        false_alarms = sum(q[y == k, c].mean() for k in range(3) if k != c)
        raised, lowered = -a[y == c, c].sum(), a[y != c, c].sum()
        assert float(raised / lowered) == pytest.approx(float(misses / false_alarms), rel=1e-12)


def test_in_a_batch_of_one_class_every_prediction_is_a_target():
    targets = calibrated_targets(LOGITS, batch(y=[1] * 6))
    expected = LOGITS.softmax(1)
    expected[:, 1] = 1
    assert torch.equal(targets, expected)


def test_fedga_averages_uniformly_by_default():
    assert FedGA().weights == "uniform"
    default, uniform, samples = (
        small.final_state(FedGA(**how), "cnn", 1).shared
        for how in ({}, {"weights": "uniform"}, {"weights": "samples"})
    )
    assert small.trees_equal(default, uniform) and not small.trees_equal(default, samples)
