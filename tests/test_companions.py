"""Methods with a small shared network beside each client's own: FML, FedKD and FedAPEN."""

import shutil
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from runs import TINY, assert_same_run, run_on_ranks, tiny_config
from tiers import STACK_FIRST, thorough_param

from fedlora_mpi.algorithm import Batch, Update, Variables, phases_of
from fedlora_mpi.algorithms.fedapen import FedAPEN
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedkd import FedKD
from fedlora_mpi.algorithms.fml import FML
from fedlora_mpi.algorithms.local import Local
from fedlora_mpi.components.compression import truncate_svd
from fedlora_mpi.config import read
from fedlora_mpi.core.batch import kl_divergence
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import add_prefix, numel, select_prefix, tmap
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.experiment.loop import resume, start
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import Fault

METHODS = pytest.mark.parametrize("method", [FML, FedKD, FedAPEN])
WITH_BN = {"small": "small:bn_net"}


def numbers(*shape, at=0):
    return torch.randn(*shape, generator=rng(1, "test", *shape, at))


@cache
def outcome(algorithm, network="cnn", rounds=2, **how):
    """(Federation, State) after ``rounds`` rounds. Cached: change nothing in it, and play no further."""
    federation, state = small.make_experiment(algorithm, network, **how)
    return federation, small.run_rounds(federation, state, rounds)


def batch(made, client=0, width=5, padding=False):
    """A mini-batch; with padding, the last two examples are none."""
    one = Batch(
        *(v if v is None else v[0] for v in made.feed.epoch([client], 0, 0).batch(1, 0, width))
    )
    return one._replace(real=torch.arange(width) < width - 2) if padding else one


def trained(made, v):
    """``v`` away from the start, in float64: two rounds of noise, the same for all leaves of a
    shape.
    """

    def moved(t):
        return t.double() + 0.1 * numbers(1, *t.shape)[0].abs()

    return Variables(*(tmap(moved, half) for half in v[:2]))


def last_step(made):
    """The step of the phase that trains both networks."""
    return phases_of(made.algorithm.local(made.model, made.settings, 1))[-1].steps[0]


def leaves(made, v):
    """(a copy of ``v``, {leaf: what is trained of it})."""
    step = last_step(made)
    copies = Variables(*(small.clone_tree(half) for half in v[:2]))
    given = copies.shared | copies.personal
    return copies, {
        n: w.requires_grad_()
        for n, w in given.items()
        if step.trains(n) and made.model.role(n) != "stats"
    }


def gradients(made, v, data):
    """({leaf: gradient of the training loss}, loss) of one client, in float64."""
    now, mine = leaves(made, v)
    data = data._replace(x=data.x.double())
    with made.model.training_context(data):
        loss = last_step(made).loss(now, v, data)
    return dict(zip(mine, torch.autograd.grad(loss, mine.values()), strict=True)), loss.detach()


def by_torch(made, v, data, formula, frozen):
    """The same by ``formula((features, logits) of F, those of g, y, personal leaves)``, which gives
    the losses of F and of g: ``frozen``, the gradient of either with the other network's output as
    a constant, else of the sum.
    """
    now, mine = leaves(made, v)
    real = slice(None) if data.real is None else data.real
    x, y = data.x.double()[real], data.y[real]
    own = {n: w for n, w in now.personal.items() if n in made.model.leaves}
    f, s = (
        parts(made.model, own, x),
        parts(made.algorithm.g(made.model), select_prefix(now.shared, ".small."), x),
    )
    if not frozen:
        loss = sum(formula(f, s, y, now.personal))
        return dict(zip(mine, torch.autograd.grad(loss, mine.values()), strict=True)), loss.detach()

    def constant(outputs):
        return tuple(o.detach() for o in outputs)

    losses = (
        formula(f, constant(s), y, now.personal)[0],
        formula(constant(f), s, y, now.personal)[1],
    )
    found = {}
    for loss, half in zip(losses, (now.personal, now.shared), strict=True):
        part = {n: w for n, w in mine.items() if n in half}
        found |= dict(zip(part, torch.autograd.grad(loss, part.values()), strict=True))
    return found, sum(losses).detach()


def parts(network, tree, x):
    """(features, logits)."""
    z = network.features(tree, x)
    return z, network.classify(tree, z)


def kl(teacher, student):
    """KL(softmax(teacher) || softmax(student)) by torch."""
    return F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")


def assert_gradients(made, v, data, formula, frozen=True):
    ours, theirs = gradients(made, v, data), by_torch(made, v, data, formula, frozen=frozen)
    assert ours[1] == pytest.approx(theirs[1].item(), rel=1e-12)
    assert ours[0].keys() == theirs[0].keys()
    for name, value in ours[0].items():
        assert torch.allclose(value, theirs[0][name], rtol=1e-9, atol=1e-12), name
        assert value.abs().max() > 0, f"{name}: no gradient"


# The small network


def test_divergence_is_torchs():
    q, p = 3 * numbers(7, 5), 3 * numbers(7, 5, at=1)
    each = F.kl_div(p.log_softmax(1), q.softmax(1), reduction="none").sum(1)
    assert torch.allclose(kl_divergence(q, p), each, atol=1e-6)
    assert not torch.allclose(kl_divergence(p, q), each, atol=1e-2)
    assert torch.equal(kl_divergence(q, q), torch.zeros(7))


@METHODS
def test_what_is_shared_is_one_small_network_for_all_models(method):
    algorithm = method(small="small:cnn")
    firsts = [
        algorithm.init(small.make_model(n), rng(1, "init")) for n in ("bn_net", "noisy_net", "cnn")
    ]
    assert all(small.trees_equal(v.shared, firsts[0].shared) for v in firsts)
    other = algorithm.init(small.make_model(), rng(2, "init")).shared
    assert not any(
        torch.equal(v, other[n]) for n, v in firsts[0].shared.items() if n.startswith(".small.")
    )
    assert not set(firsts[0].shared) & {n for v in firsts for n in v.personal}


@METHODS
def test_the_small_network_follows_the_mode_of_the_clients(method):
    model = small.make_model()
    assert (
        method(**WITH_BN).g(model).training and not method(**WITH_BN).g(model.eval_mode()).training
    )


@METHODS
@pytest.mark.parametrize(
    "name, said",
    [
        ("cnn9", "small = cnn9: cannot be built: "),
        (
            "cnn5",
            "small = cnn5: cannot be built: two 5x5 convolutions with 2x2 pools need images of at "
            "least 16 x 16 pixels",
        ),
    ],
)
def test_an_impossible_small_network_is_refused(method, name, said):
    with pytest.raises(ValueError) as refusal:
        method(small=name).check(small.make_model(), small.TRAIN)
    assert str(refusal.value).startswith(said)


@METHODS
@STACK_FIRST
def test_everything_of_both_networks_trains_and_statistics_are_counted_once(method, stacked):
    federation, state = small.make_experiment(method(**WITH_BN), "bn_net", stacked=stacked)
    g = federation.algorithm.g(federation.clients.trainer.model)
    for done in federation.clients.trainer.train(
        federation.placement.local_clients, state.shared, state.personal, 1
    ):
        names = [n for n in done.start.shared if n.startswith(".small.")]
        moved = [not torch.equal(done.start.shared[n], done.end.shared[n]) for n in names]
        moved += [
            not torch.equal(v, done.end.personal[n])
            for n, v in done.start.personal.items()
            if n != ".mix.w"
        ]
        assert all(moved)
    # One step without a learning rate leaves a tenth of the batch's mean in the statistics, not
    # more.
    still = replace(small.TRAIN, epochs=1, lr=1e-30, batch_size=11)
    whole = {"equal": True, "held_out": 0.0} if method is FedAPEN else {}
    made = small.make_trainer(method(**WITH_BN, **whole), "bn_net", train=still, stacked=stacked)
    v = small.initial_variables(made)
    (done, *_) = made.train([0], v.shared, small.repeat_rows(v.personal, 1), 0)
    plain = small.make_trainer(FedAvg(), "bn_net", train=still)
    for tree, begin in (
        (done.end.personal, v.personal),
        (select_prefix(done.end.shared, ".small."), select_prefix(v.shared, ".small.")),
    ):
        (once,) = plain.train([0], {n: begin[n] for n in g.leaves}, {}, 0)
        for n in g.leaves:
            if g.role(n) == "stats":
                assert torch.allclose(tree[n], once.end.shared[n], atol=1e-6), n


@METHODS
@pytest.mark.parametrize(
    "own, shared",
    [("cnn", "bn_net"), thorough_param("bn_net", "cnn"), thorough_param("noisy_net", "noisy_net")],
)
def test_loop_and_stack_train_alike(method, own, shared):
    ends = []
    for stacked in (False, True):
        federation, state = small.make_experiment(
            method(small=f"small:{shared}"), own, stacked=stacked
        )
        state = small.run_rounds(federation, state, 1)
        trained = federation.clients.trainer.train(
            federation.placement.local_clients, state.shared, state.personal, 1
        )
        ends.append(
            [small.clone_tree(d.end.shared | d.end.personal) | {"loss": d.loss} for d in trained]
        )
    for loop, stack in zip(*ends, strict=True):
        small.assert_near(stack, loop, rtol=1e-4)


def test_noise_is_that_of_the_batch_and_differs_between_the_networks():
    made = small.make_trainer(FML(small="small:noisy_net"), "noisy_net")
    v = small.initial_variables(made)
    v = Variables(add_prefix(v.personal, ".small."), v.personal)  # g is F
    data = batch(made)

    def outputs(data):
        with made.model.training_context(data):
            return made.algorithm.both_logits(made.model, v, data)

    once, again, other = outputs(data), outputs(data), outputs(data._replace(key=data.key + 9))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True)) and not torch.equal(
        *once
    )
    assert not any(torch.equal(a, b) for a, b in zip(once, other, strict=True))


# FML


@STACK_FIRST
@pytest.mark.parametrize("own, shared", [("cnn", "bn_net"), thorough_param("bn_net", "cnn")])
@pytest.mark.parametrize("participation", [thorough_param(1.0), 0.6])
def test_fml_without_teachers_is_local_beside_fedavg(stacked, own, shared, participation):
    how = {"stacked": stacked, "participation": participation, "rounds": 3}
    mutual = FML(small=f"small:{shared}", alpha=1.0, beta=1.0)
    first = small.initial_variables(small.make_trainer(mutual, own))
    _, both = outcome(mutual, own, **how)
    _, alone = outcome(Local(), own, **how)
    assert small.trees_equal(both.personal, alone.personal)
    how.pop("rounds")
    federation, state = small.make_experiment(FedAvg(weights="uniform"), shared, **how)
    averaged = small.run_rounds(
        federation, state._replace(shared=select_prefix(first.shared, ".small.")), 3
    )
    assert small.trees_equal(select_prefix(both.shared, ".small."), averaged.shared)
    _, taught = outcome(replace(mutual, alpha=0.5, beta=0.5), own, rounds=3, **how)
    assert not any(torch.equal(v, taught.personal[n]) for n, v in alone.personal.items())
    assert not any(torch.equal(v, taught.shared[n]) for n, v in both.shared.items())


@pytest.mark.parametrize("alpha, beta", [(0.5, 0.5), (0.3, 0.8)])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("own, shared", [("cnn", "bn_net"), ("bn_net", "cnn")])
def test_the_gradients_of_fml_are_those_of_its_losses(alpha, beta, padding, own, shared):
    made = small.make_trainer(FML(small=f"small:{shared}", alpha=alpha, beta=beta), own)

    def formula(f, g, y, own):
        local = alpha * F.cross_entropy(f[1], y) + (1 - alpha) * kl(g[1], f[1])
        return local, beta * F.cross_entropy(g[1], y) + (1 - beta) * kl(f[1], g[1])

    assert_gradients(
        made, trained(made, small.initial_variables(made)), batch(made, padding=padding), formula
    )


def test_equal_networks_teach_each_other_nothing():
    made = small.make_trainer(FML(small="small:cnn", alpha=0.3, beta=0.2))
    v = trained(made, small.initial_variables(made))
    v = Variables(add_prefix(v.personal, ".small."), v.personal)
    grads, loss = gradients(made, v, batch(made))
    plain, fit = gradients(
        small.make_trainer(replace(made.algorithm, alpha=1.0, beta=1.0)), v, batch(made)
    )
    assert loss == pytest.approx(0.25 * fit.item(), rel=1e-12)
    for name, value in grads.items():
        share = 0.2 if name.startswith(".small.") else 0.3
        assert torch.allclose(value, share * plain[name], atol=1e-12), name


def test_the_clients_own_model_is_the_large_one():
    for method in (FML, FedKD):
        made = small.make_trainer(method(**WITH_BN))
        v, x = small.initial_variables(made), batch(made).x
        assert torch.equal(
            made.algorithm.logits(made.model, v, x), made.model(made.model.initial, x)
        )


# FedKD


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("own, shared", [("cnn", "bn_net"), ("bn_net", "cnn")])
@pytest.mark.parametrize("detached", [False, True])
def test_the_gradients_of_fedkd_are_those_of_its_losses(padding, own, shared, detached):
    made = small.make_trainer(FedKD(small=f"small:{shared}", detached=detached), own)
    held = torch.Tensor.detach if detached else lambda v: v

    def formula(t, s, y, own):
        D = held(F.cross_entropy(t[1], y) + F.cross_entropy(s[1], y))
        hidden = F.mse_loss(F.linear(s[0], own[".hidden.W_h"]), t[0])
        L_t = F.cross_entropy(t[1], y) + kl(held(s[1]), t[1]) / D + hidden / D
        return L_t, F.cross_entropy(s[1], y) + kl(held(t[1]), s[1]) / D + hidden / D

    assert_gradients(
        made,
        trained(made, small.initial_variables(made)),
        batch(made, padding=padding),
        formula,
        frozen=False,
    )


def test_w_h_begins_with_the_bounds_of_torchs_linear():
    made = small.make_trainer(FedKD(small="small:cnn"), "linear_net")
    W_h = small.initial_variables(made).personal[".hidden.W_h"]
    assert (
        W_h.shape == (105, 5) and 0.95 < W_h.abs().max() * 5**0.5 <= 1 and W_h.mean().abs() < 0.05
    )


def test_a_network_without_a_linear_head_is_refused_by_fedkd():
    with pytest.raises(
        ValueError, match="^small = test_companions:all_convolution: needs a network that ends in a"
    ):
        FedKD(small="test_companions:all_convolution").check(small.make_model(), small.TRAIN)
    model = small.make_model("test_companions:all_convolution")
    with pytest.raises(ValueError, match="^name = fedkd: needs a network that ends in a Linear"):
        FedKD(**WITH_BN).check(model, small.TRAIN)


def all_convolution(classes, shape):
    """A network that ends in a convolution."""
    return torch.nn.Sequential(torch.nn.Conv2d(shape[0], classes, shape[1:]), torch.nn.Flatten())


def spectrum(*values, d1=4, d2=5):
    """A matrix with these singular values."""
    U, V = (torch.linalg.qr(numbers(d, d, at=d).double())[0] for d in (d1, d2))
    s = torch.tensor(values).double()
    return (U[:, : len(s)] * s) @ V[: len(s)]


@pytest.mark.parametrize("energy, n", [
    (0.0, 1), (0.6, 1), (9 / 14 - 1e-9, 1), (9 / 14 + 1e-9, 2), (13 / 14 - 1e-9, 2), (13 / 14 + 1e-9, 3), (1.0, 3),
])  # fmt: skip
def test_truncation_keeps_the_fewest_singular_values_that_hold_the_energy(energy, n):
    matrix = spectrum(3.0, 2.0, 1.0)
    kept, count = truncate_svd(matrix, torch.tensor(energy, dtype=torch.float64))
    assert count == n * (4 + 5 + 1)
    assert torch.allclose(kept, spectrum(*[3.0, 2.0, 1.0][:n]), atol=1e-12)


def test_exactly_the_energy_is_enough():
    kept, count = truncate_svd(
        torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), torch.tensor(0.5).double()
    )
    assert count == 3 + 2 + 1 and kept.square().sum() == 4


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 2, 3, 3)])
def test_truncation_at_full_energy_loses_nothing(shape):
    matrix = numbers(*shape)
    kept, count = truncate_svd(matrix, torch.tensor(1.0).double())
    d1, d2 = matrix.flatten(1).shape
    assert (
        torch.allclose(kept, matrix, atol=1e-6)
        and kept.dtype == matrix.dtype
        and kept.shape == shape
    )
    assert count == min(d1, d2) * (d1 + d2 + 1)
    assert not torch.allclose(
        truncate_svd(matrix, torch.tensor(0.3).double())[0], matrix, atol=1e-2
    )


def test_the_energy_that_is_kept_is_enough_and_the_numbers_grow_with_it():
    matrix, counts = numbers(20, 3, 5, 5), []
    for energy in torch.linspace(0, 1, 21).double():
        kept, count = truncate_svd(matrix, energy)
        counts.append(int(count))
        assert kept.square().sum() >= (energy - 1e-6) * matrix.square().sum()
        n = int(count) // 96
        s = np.linalg.svd(matrix.flatten(1).numpy(), compute_uv=False).astype(np.float64)
        assert n == 1 or (s[: n - 1] ** 2).sum() < energy * (s**2).sum()
    assert counts == sorted(counts) and counts[0] == 96 and counts[-1] == 20 * 96


def test_truncation_of_deficient_matrices():
    full = torch.tensor(1.0).double()
    narrow = numbers(4, 5)
    narrow[:, 2:] = 0
    for low in (narrow, spectrum(3.0, 2.0)):
        kept, count = truncate_svd(low, full)
        assert count == 2 * 10 and torch.allclose(kept, low, atol=1e-6)
    kept, count = truncate_svd(torch.zeros(4, 5), full)
    assert torch.equal(kept, torch.zeros(4, 5)) and count == 10
    broken = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]])
    assert torch.equal(truncate_svd(broken, full)[0].isfinite(), broken.isfinite())


def test_every_client_of_a_stack_has_its_own_rank():
    spectra = (3.0, 2.0, 1.0), (3.0, 0.1, 0.1), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    matrices = torch.stack([spectrum(*values) for values in spectra])
    energy = torch.tensor([0.9] * 4).double()
    kept, counts = torch.func.vmap(truncate_svd)(matrices, energy)
    assert counts.tolist() == [20, 10, 10, 30]
    for row, matrix in enumerate(matrices):
        assert torch.allclose(kept[row], truncate_svd(matrix, energy[row])[0], atol=1e-14)


@dataclass(frozen=True)
class Whole(FedKD):
    """FedKD whose messages are whole."""

    def local(self, model, train, round_):
        return phases_of(super().local(model, train, round_))

    def server_update(self, server, shared, aggregate, svd):
        return Update(aggregate.mean, server)


@STACK_FIRST
def test_fedkd_at_full_energy_is_mutual_distillation_with_fedavg(stacked):
    full = {"energy_start": 1.0, "energy_end": 1.0, **WITH_BN}
    how = {"network": "bn_net", "stacked": stacked, "rounds": 3, "participation": 0.6}
    (_, a), (_, b) = (outcome(method(**full), **how) for method in (FedKD, Whole))
    g = select_prefix(a.shared, ".small.")
    small.assert_near(g, select_prefix(b.shared, ".small."))
    small.assert_near(a.personal, b.personal)
    _, less = outcome(FedKD(energy_start=0.5, energy_end=0.5, **WITH_BN), **how)
    assert any(
        (v - select_prefix(less.shared, ".small.")[n]).abs().max() > 1e-3 for n, v in g.items()
    )


def ranks_of(old, new, energy):
    """Numbers of the message that tells new - old, from numpy's SVD."""
    total = 0
    for name, before in old.items():
        update = (new[name] - before).double().numpy()
        if update.ndim == 1:
            total += update.size
            continue
        s = np.linalg.svd(update.reshape(len(update), -1), compute_uv=False)
        n = next(n for n in range(1, len(s) + 1) if (s[:n] ** 2).sum() >= energy * (s**2).sum())
        total += n * (len(update) + update[0].size + 1)
    return total


def shortened(old, new, energy):
    """``new`` as that message tells it."""
    energy = torch.tensor(energy, dtype=torch.float64)
    return {
        n: v if v.dim() == 1 else old[n] + truncate_svd(v - old[n], energy)[0]
        for n, v in new.items()
    }


@STACK_FIRST
def test_the_messages_of_fedkd_and_their_bytes_are_those_of_the_ranks(stacked):
    settings = {"energy_start": 0.5, "energy_end": 0.9, "energy_rounds": 4, **WITH_BN}
    federation, state = small.make_experiment(FedKD(**settings), stacked=stacked)
    whole, _ = small.make_experiment(Whole(**settings), stacked=stacked)
    down = numel(select_prefix(state.shared, ".small."))
    for round_, energy in enumerate((0.6, 0.7, 0.8, 0.9, 0.9)):
        old, uploads, ups = select_prefix(small.clone_tree(state.shared), ".small."), [], 0
        for done in whole.clients.trainer.train(
            federation.placement.local_clients,
            state.shared,
            small.clone_tree(state.personal),
            round_,
        ):
            new = select_prefix(small.clone_tree(done.end.shared), ".small.")
            uploads.append(shortened(old, new, energy))
            ups += ranks_of(old, new, energy)
        for done, upload in zip(
            federation.clients.trainer.train(
                federation.placement.local_clients, state.shared, state.personal, round_
            ),
            uploads,
            strict=True,
        ):
            message = federation.algorithm.upload(done.start, done.end, round_).mean
            small.assert_near(select_prefix(message, ".small."), upload)
        mean = {n: (sum(upload[n].double() for upload in uploads) / 5).float() for n in old}
        state, row, _ = run_round(federation, state, evaluate=False, stop=False)
        assert (row["bytes_up"], row["bytes_down"]) == (4 * ups, 4 * 5 * down), round_
        down = ranks_of(old, mean, energy)
        assert state.server[".svd.numbers"] == down and all(
            n.startswith(".small.") for n in state.shared
        )
        small.assert_near(select_prefix(state.shared, ".small."), shortened(old, mean, energy))


@STACK_FIRST
def test_more_energy_is_a_longer_message(stacked):
    sent = []
    for energy in (0.2, 0.6, 0.9, 1.0):
        federation, state = small.make_experiment(
            FedKD(energy_start=energy, energy_end=energy, **WITH_BN), stacked=stacked
        )
        sent.append(run_round(federation, state, evaluate=False, stop=False)[1]["bytes_up"])
    assert sent == sorted(sent) and len(set(sent)) == 4


@STACK_FIRST
def test_a_client_of_fedkd_that_diverges_is_reported(stacked):
    federation, state = small.make_experiment(
        FedKD(**WITH_BN),
        stacked=stacked,
        train=replace(small.TRAIN, lr=1e30, epochs=5),
        sizes=(11, 7),
    )
    with pytest.raises(Fault, match="not finite"):
        small.run_rounds(federation, state, 2)


# FedAPEN


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("own, shared", [("cnn", "bn_net"), ("bn_net", "cnn")])
def test_the_gradients_of_fedapen_are_those_of_its_losses(padding, own, shared):
    made = small.make_trainer(FedAPEN(small=f"small:{shared}"), own)
    v = trained(made, small.initial_variables(made))
    v.personal[".mix.w"] = torch.tensor(0.3, dtype=torch.float64)

    def formula(p, s, y, own):
        mixed = F.cross_entropy(0.3 * p[1] + 0.7 * s[1], y)
        L_p = F.cross_entropy(p[1], y) + kl(s[1], p[1]) + mixed
        return L_p, F.cross_entropy(s[1], y) + kl(p[1], s[1]) + mixed

    assert_gradients(made, v, batch(made, padding=padding), formula)


def test_the_mixture_is_the_private_network_at_1_and_the_shared_one_at_0():
    made = small.make_trainer(FedAPEN(**WITH_BN))
    model, v, x = made.model.eval_mode(), small.initial_variables(made), batch(made).x
    g = made.algorithm.g(model)
    p, s = model(model.initial, x), g(select_prefix(v.shared, ".small."), x)

    def at(w):
        return made.algorithm.logits(
            model, v._replace(personal=v.personal | {".mix.w": torch.tensor(w)}), x
        )

    assert torch.equal(at(1.0), p) and torch.equal(at(0.0), s)
    assert torch.allclose(at(0.25), 0.25 * p + 0.75 * s) and not torch.allclose(
        at(0.25), 0.75 * p + 0.25 * s
    )


@STACK_FIRST
@pytest.mark.parametrize("lr", [thorough_param(1e-3), 0.3, 1e3])
def test_w_is_learned_as_torch_would_on_the_samples_held_out(stacked, lr):
    algorithm = FedAPEN(held_out=0.3, w_lr=lr, **WITH_BN)
    federation, state = small.make_experiment(algorithm, stacked=stacked, sizes=(11, 7, 3))
    assert state.personal[".mix.w"].tolist() == [0.5] * 3
    state = small.run_rounds(federation, state, 1)
    assert state.personal[".mix.w"].tolist() == [0.5] * 3
    model, expected = federation.clients.trainer.model.eval_mode(), []
    rows, shared = small.clone_tree(state.personal), small.clone_tree(state.shared)
    for row, client in enumerate(federation.placement.local_clients):
        w = torch.tensor(0.5, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=lr)
        v = Variables(shared, {n: value[row] for n, value in rows.items()})
        for epoch in range(10):
            held = federation.clients.trainer.feed.epoch(
                [client], 1, f"adaptability {epoch}", 0.3, True
            )
            (count,) = held.sizes
            assert count == {11: 3, 7: 2, 3: 1}[federation.clients.sizes[client]]
            data = held.batch(1, 0, count)
            optimizer.zero_grad()
            logits = algorithm.logits(
                model, v._replace(personal=v.personal | {".mix.w": w}), data.x[0]
            )
            F.cross_entropy(logits, data.y[0]).backward()
            optimizer.step()
            w.data.clamp_(0, 1)
        expected.append(w.item())
    judged = federation.clients.trainer.evaluate(
        federation.placement.local_clients, state.shared, state.personal, 1
    )

    def with_w(w):
        return rows | {".mix.w": torch.tensor(w)}

    fixed = small.make_trainer(
        FedAPEN(equal=True, **WITH_BN), samples=federation.clients.trainer.feed, stacked=stacked
    )
    assert torch.allclose(
        judged,
        fixed.evaluate(federation.placement.local_clients, shared, with_w(expected), 1),
        atol=1e-6,
    )
    if lr > 1e-2:
        assert not torch.allclose(
            judged,
            fixed.evaluate(federation.placement.local_clients, shared, with_w([0.5] * 3), 1),
            atol=1e-6,
        )
    assert small.trees_equal(rows, state.personal)  # an evaluation changes nothing
    learned = small.run_rounds(federation, state, 1).personal[".mix.w"]
    assert learned.tolist() == pytest.approx(expected, abs=1e-6) and learned.tolist() != [0.5] * 3
    assert lr < 1e3 or set(learned.tolist()) <= {0.0, 1.0}


@dataclass(frozen=True)
class OnlyW(FedAPEN):
    """FedAPEN whose networks stay."""

    def local(self, model, train, round_):
        return self.personalize(model, train, round_)


@STACK_FIRST
def test_learning_w_moves_w_alone(stacked):
    made = small.make_trainer(OnlyW(**WITH_BN), "bn_net", stacked=stacked)
    v = small.initial_variables(made)
    for done in made.train(range(5), v.shared, small.repeat_rows(v.personal, 5), 3):
        assert small.trees_equal(done.end.shared, v.shared)
        assert [n for n, w in done.end.personal.items() if not torch.equal(w, v.personal[n])] == [
            ".mix.w"
        ]


def test_equal_weights_stay():
    how = {"network": "bn_net", "rounds": 2}
    federation, fixed = outcome(FedAPEN(equal=True, **WITH_BN), **how)
    assert fixed.personal[".mix.w"].tolist() == [0.5] * 5 and not federation.algorithm.personalize(
        federation.clients.trainer.model, small.TRAIN, 1
    )
    _, still = outcome(FedAPEN(w_epochs=0, **WITH_BN), **how)
    assert small.trees_equal(still.shared, fixed.shared) and small.trees_equal(
        still.personal, fixed.personal
    )
    _, whole = outcome(FedAPEN(equal=True, held_out=0.0, **WITH_BN), **how)
    assert not small.trees_equal(whole.shared, fixed.shared)
    with pytest.raises(ValueError, match="^held_out = 0: leaves nothing to learn w on"):
        FedAPEN(held_out=0.0)


def test_a_client_with_one_sample_keeps_its_w():
    federation, state = outcome(FedAPEN(**WITH_BN), sizes=(9, 2, 1), stacked=True)
    w = dict(
        zip(federation.placement.local_clients, state.personal[".mix.w"].tolist(), strict=True)
    )
    assert w[2] == 0.5 and w[0] != 0.5 and w[1] != 0.5
    _, loop = outcome(FedAPEN(**WITH_BN), sizes=(9, 2, 1))
    small.assert_near(state.shared, loop.shared, rtol=1e-4)


# Different networks of the clients


MIX = (
    "model={mix: [cnn, 'user_parts:with_norm']}",
    "algorithm.small=user_parts:with_norm",
    "train.lr=0.02",
)


def mixed(name, ranks):
    """[(hosted, state, row, scores)] of each rank after two rounds."""
    config = tiny_config(f"algorithm={name}", *MIX)

    def main(comm):
        parts = build(config, str(TINY), comm)
        state = initial_state(parts)
        for _ in range(2):
            state, row, scores = run_round(parts.federation, state, evaluate=True, stop=False)
        personal = {}
        for number, clients in enumerate(parts.federation.placement.local_clients_by_type):
            for at, client in enumerate(clients):
                mine = {
                    n: v[at] for n, v in state.personal.items() if n.startswith(f"kind-{number}/")
                }
                personal[client] = small.clone_tree(mine)
        return small.clone_tree(state.shared), personal, row, scores

    return run_on_ranks(ranks, main)


@pytest.mark.parametrize("name", [thorough_param("fml"), "fedkd", thorough_param("fedapen")])
def test_clients_of_two_architectures_have_the_same_bits_on_any_ranks(name):
    ((shared, personal, row, scores),) = mixed(name, 1)
    kinds = [{n.partition("/")[0] for n in personal[client]} for client in range(7)]
    assert kinds == [{f"kind-{client % 2}"} for client in range(7)]
    met = set()
    for other, rows, theirs, accuracy in mixed(name, 3):
        assert small.trees_equal(shared, other) and row["train_loss"] == theirs["train_loss"]
        assert row["bytes_up"] == theirs["bytes_up"] and row["flops"] == theirs["flops"]
        assert all(np.array_equal(scores[n], accuracy[n], equal_nan=True) for n in scores)
        assert all(small.trees_equal(personal[client], mine) for client, mine in rows.items())
        met |= set(rows)
    assert met == set(range(7))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["fml", "fedkd", "fedapen"])
def test_clients_of_two_architectures_resume_to_the_bit(name, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(read(TINY, [f"algorithm={name}", *MIX, f"output={whole}"]), str(TINY), Solo()) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/000004")
    assert resume(cut, [], Solo()) == 0
    assert_same_run(whole, cut)
