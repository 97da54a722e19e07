"""pFedLoRA against Local, plain autograd and closed forms: who moves what, what travels, what is
judged.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from runs import TINY, build_tiny, run_rounds
from tiers import STACK_FIRST, thorough_param

from fedlora_mpi import open_run
from fedlora_mpi.algorithm import Algorithm, Batch, Phase, Transport, Variables
from fedlora_mpi.algorithms.local import Local
from fedlora_mpi.algorithms.pfedlora import PFedLoRA
from fedlora_mpi.cli import main
from fedlora_mpi.components.adapter import Adapter
from fedlora_mpi.config import from_dict
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import numel, select_prefix
from fedlora_mpi.data.feed import Feed
from fedlora_mpi.experiment.parts import load_data
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.models import zoo

PLACES = ("matrix", "conv", "side", "alone")
NETS = (thorough_param("cnn"), "bn_net", thorough_param("noisy_net"))
every_place = pytest.mark.parametrize("place", PLACES)
PATHS = pytest.mark.parametrize("stacked", [False, True], ids=["loop", "stack"])


def of(place="matrix", **fields):
    return PFedLoRA(adapter=place, lora_rank=2, **fields)


def woken(v, scale=0.3):
    """The same variables with an adapter that does something: B is not 0."""
    B = v.shared[".adapter..B"]
    return v._replace(
        shared=v.shared | {".adapter..B": scale * torch.randn(B.shape, generator=rng(5, "B"))}
    )


def batch(made, client=0, width=5):
    return Batch(
        *(v if v is None else v[0] for v in made.feed.epoch([client], 0, 0).batch(1, 0, width))
    )


def trained(made, v, client=0, round_=0):
    """(start, end) of one client."""
    (done,) = made.train([client], v.shared, small.repeat_rows(v.personal, 1), round_)
    return done.start, done.end


def moved(before, after):
    return {n for n in before if not torch.equal(before[n], after[n])}


# --- degenerate cases


@every_place
@pytest.mark.parametrize("network", NETS)
@STACK_FIRST
def test_without_mu_and_without_adapter_epochs_it_is_local_to_the_bit(place, network, stacked):
    ends = []
    for algorithm in (of(place, mu=0.0, adapter_epochs=0), Local()):
        federation, state = small.make_experiment(algorithm, network, stacked=stacked)
        ends.append(small.run_rounds(federation, state, 2))
    assert small.trees_equal(ends[0].personal, ends[1].personal)
    begin = small.repeat_rows(federation.clients.types[0].initial.personal, len(small.SIZES))
    assert moved(begin, ends[0].personal) == set(begin)


def test_without_mu_and_adapter_epochs_its_rounds_are_those_of_local():
    pfedlora = run_rounds("algorithm={name: pfedlora, mu: 0.0, adapter_epochs: 0}")[0]
    local = run_rounds("algorithm=local")[0]
    for a, b in zip(pfedlora[1:], local[1:], strict=True):
        assert small.trees_equal(a.personal, b.personal)
        assert (
            np.array_equal(a.clients["accuracy"], b.clients["accuracy"])
            and a.row["train_loss"] == b.row["train_loss"]
        )


@pytest.mark.parametrize("place", ["matrix", "conv", "side"])
@pytest.mark.parametrize("network", ["cnn", thorough_param("bn_net")])
def test_an_adapter_that_never_trains_makes_both_losses_one_whatever_mu(place, network):
    ends = []
    for mu in (0.0, 0.3, 1.0):
        federation, state = small.make_experiment(of(place, mu=mu, adapter_epochs=0), network)
        ends.append(small.run_rounds(federation, state, 2).personal)
    small.assert_near(ends[0], ends[1], 1e-4)
    small.assert_near(ends[0], ends[2], 1e-4)


# --- who moves


@STACK_FIRST
@every_place
@pytest.mark.parametrize("network", NETS)
def test_the_first_phase_moves_the_network_alone_and_the_second_the_adapter_alone(
    place, network, stacked
):
    made = small.make_trainer(of(place), network, stacked=stacked)
    v = woken(small.initial_variables(made))
    first, second = made.algorithm.local(made.model, made.settings, 0)
    halves = []
    for phase in (first, second):
        start, end = trained(replace(made, transport=Transport(OnePhase(phase))), v)
        halves.append((moved(start.shared, end.shared), moved(start.personal, end.personal)))
    assert halves[0][0] == set() and halves[0][1] == set(made.model.leaves)
    assert halves[1] == ({".adapter..A", ".adapter..B"}, set())


@dataclass(frozen=True)
class OnePhase(Algorithm):
    """Nothing but this phase."""

    phase: Phase

    def local(self, model, train, round_):
        return (self.phase,)


def test_running_statistics_are_those_of_the_network_without_the_adapter():
    ends = []
    for place, mu in (("conv", 0.5), ("conv", 0.0)):
        made = small.make_trainer(
            of(place, mu=mu, adapter_epochs=2), "bn_net", replace(small.TRAIN, epochs=1, lr=1e-9)
        )
        _, end = trained(made, woken(small.initial_variables(made)))
        ends.append({n: t for n, t in end.personal.items() if made.model.role(n) == "stats"})
    assert len(ends[0]) >= 4
    small.assert_near(*ends)
    _, local = trained(
        replace(made, transport=Transport(Local())),
        Variables({}, small.initial_variables(made).personal),
    )
    # as often as without an adapter, too
    small.assert_near(ends[0], {n: local.personal[n] for n in ends[0]})


@PATHS
@every_place
def test_training_another_client_leaves_an_upload_alone(place, stacked):
    made = small.make_trainer(of(place), stacked=stacked)
    v = woken(small.initial_variables(made))
    kept = []
    for done in made.train([0, 1, 2], v.shared, small.repeat_rows(v.personal, 3), 0):
        upload = made.algorithm.upload(done.start, done.end, 0).mean
        kept.append((upload, small.clone_tree(upload)))
    assert all(small.trees_equal(now, then) for now, then in kept)
    assert not small.trees_equal(kept[0][1], kept[1][1])
    again = small.initial_variables(made)
    # nothing given moved
    assert small.trees_equal(v.personal, again.personal) and small.trees_equal(
        woken(again).shared, v.shared
    )


# --- what travels


@cache
def large(name, classes):
    """A network of the zoo for images of CIFAR's size; change nothing in it."""
    return zoo.build(name, {}, classes, (3, 32, 32), 1)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("place, numbers", [("matrix", lambda c: 8 * (500 + c)), ("conv", lambda c: 75 * 8 + 16 * 8),
                                            ("side", lambda c: 8 * 3072 + 500 * 8),
                                            ("alone", lambda c: 8 * (500 + c))])  # fmt: skip
def test_all_five_networks_send_an_adapter_of_one_shape(place, numbers, classes):
    algorithm, shapes = PFedLoRA(adapter=place), []
    for name in ("cnn1", "cnn2", "cnn3", "cnn4", "cnn5"):
        model = large(name, classes)
        v = algorithm.init(model, rng(1, "init"))
        upload, transport = algorithm.upload(v, v, 0), algorithm.transport(0, 1)
        assert numel(upload.mean) == numel(transport.download(v.shared)) == numbers(classes)
        assert upload.message.keys() == upload.mean.keys() and upload.numel is None
        assert transport.download_numel is None  # what is counted is all that travels
        assert numel(v.personal) == numel(model.initial)
        shapes.append({n: t.shape for n, t in upload.mean.items()})
    assert all(shape == shapes[0] for shape in shapes)


def test_a_round_counts_the_adapter_up_and_down_for_every_client_of_the_cohort():
    for name, numbers in (
        ("matrix", 3 * (8 + 4)),
        ("conv", 9 * 3 + 4 * 3),
        ("side", 64 * 3 + 8 * 3),
        ("alone", 3 * (8 + 4)),
    ):
        how = f"algorithm={{name: pfedlora, adapter: {name}, lora_rank: 3}}"
        for moment in run_rounds(how, "rounds=1")[0][1:]:
            # 4 of 7 clients
            assert moment.row["bytes_up"] == moment.row["bytes_down"] == 4 * numbers * 4


def test_clients_with_one_network_and_one_sample_each_have_equal_adapters():
    federation, state = small.make_experiment(of(), sizes=(4, 4, 4), same_sample=True)
    trainer = federation.clients.trainer
    rows = {n: v[:3] for n, v in state.personal.items()}
    uploads = [
        trainer.algorithm.upload(d.start, d.end, 0).mean
        for d in trainer.train([0, 1, 2], state.shared, rows, 0)
    ]
    assert all(small.trees_equal(uploads[0], other) for other in uploads[1:])


@pytest.mark.parametrize("participation", [1.0, 0.6])
def test_the_adapter_stays_within_what_was_sent(participation):
    federation, state = small.make_experiment(of(), participation=participation)
    for _ in range(2):
        chosen, uploads = sorted(federation.cohorts.sample(state.round).members), []

        def rows(c, state=state):
            return {
                n: v[[federation.placement.row_of_client[c]]] for n, v in state.personal.items()
            }

        for c in chosen:
            (done,) = federation.clients.trainer.train([c], state.shared, rows(c), state.round)
            upload = federation.algorithm.upload(done.start, done.end, state.round)
            uploads.append(upload.mean)
        sizes = torch.tensor(
            [float(federation.clients.sizes[c]) for c in chosen], dtype=torch.float64
        )
        state, _, _ = run_round(federation, state, evaluate=False, stop=False)
        for name, value in state.shared.items():
            sent = torch.stack([u[name] for u in uploads])
            assert (value >= sent.amin(0) - 1e-7).all() and (value <= sent.amax(0) + 1e-7).all()
            mean = torch.einsum("c,c...->...", sizes / sizes.sum(), sent.double())
            torch.testing.assert_close(value, mean.float(), rtol=1e-5, atol=1e-7)


# --- the losses


def plain(place, model, w, theta, data, scale=1.0):
    """Logits of the network with the adapter, or of the adapter alone, written with
    torch.nn.functional only (the small cnn).
    """
    A, B, x = theta["A"], theta["B"], data.x
    y = F.conv2d(x, w["0.weight"], w["0.bias"], padding=1)
    if place == "conv":
        y = y + scale * F.conv2d(F.conv2d(x, A, padding=1), B[:, :, None, None])
    y = F.max_pool2d(F.relu(y), 2)
    y = F.max_pool2d(F.relu(F.conv2d(y, w["3.weight"], w["3.bias"], padding=1)), 2)
    z = F.relu(F.linear(y.flatten(1), w["7.weight"], w["7.bias"]))
    if place == "side":
        z = z + scale * F.linear(F.linear(x.flatten(1), A), B)
    if place == "alone":
        return scale * F.linear(F.linear(z, A), B)
    logits = F.linear(z, w["9.weight"], w["9.bias"])
    return logits + scale * F.linear(F.linear(z, A), B) if place == "matrix" else logits


def plain_network(model, w, data):
    """Logits of the small cnn without an adapter."""
    return plain("nowhere", model, w, {"A": None, "B": None}, data)


@pytest.mark.parametrize("mu_on, share", [("combined", 0.3), ("model", 0.7)])
@every_place
def test_losses_and_gradients_of_both_phases_are_those_of_plain_torch(place, mu_on, share):
    algorithm = of(place, mu=0.3, mu_on=mu_on, scale=0.7)
    made = small.make_trainer(algorithm)
    model, v, data = made.model, woken(small.initial_variables(made)), batch(made)
    first, second = (phase.steps[0].loss for phase in algorithm.local(model, made.settings, 0))
    leaves = {n: t.detach().clone().requires_grad_() for n, t in (v.shared | v.personal).items()}
    now = Variables({n: leaves[n] for n in v.shared}, {n: leaves[n] for n in v.personal})
    ours = [first(now, now, data), second(now, now, data)]
    theta = select_prefix(leaves, ".adapter..")
    combined = F.cross_entropy(plain(place, model, leaves, theta, data, 0.7), data.y)
    network = F.cross_entropy(plain_network(model, leaves, data), data.y)
    theirs = [(1 - share) * network + share * combined, combined]
    assert abs(network - combined) > 1e-3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        grads = (
            torch.autograd.grad(
                loss, list(leaves.values()), retain_graph=True, materialize_grads=True
            )
            for loss in (a, b)
        )
        for n, mine, other in zip(leaves, *grads, strict=True):
            torch.testing.assert_close(
                mine, other, rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}"
            )


@pytest.mark.parametrize("place", ["matrix", "alone"])
def test_one_step_of_each_phase_is_a_step_of_plain_sgd(place):
    algorithm = of(place, mu=0.4)
    made = small.make_trainer(
        algorithm, train=replace(small.TRAIN, epochs=1, batch_size=20, momentum=0.0)
    )
    v, model = woken(small.initial_variables(made)), made.model
    _, end = trained(made, v, client=1)
    data = [
        Batch(*(t if t is None else t[0] for t in made.feed.epoch([1], 0, e).batch(1, 0, 7)))
        for e in (0, 1)
    ]
    w = {n: t.clone().requires_grad_() for n, t in v.personal.items()}
    theta = {
        n: t.clone().requires_grad_() for n, t in select_prefix(v.shared, ".adapter..").items()
    }

    def ce(w, theta, d):
        return F.cross_entropy(plain(place, model, w, theta, d), d.y)

    network = F.cross_entropy(plain_network(model, w, data[0]), data[0].y)
    loss = 0.6 * network + 0.4 * ce(w, theta, data[0])
    w = {
        n: (t - 0.05 * g).detach()
        for (n, t), g in zip(w.items(), torch.autograd.grad(loss, list(w.values())), strict=True)
    }
    grads = torch.autograd.grad(ce(w, theta, data[1]), list(theta.values()))
    theta = {n: t - 0.05 * g for (n, t), g in zip(theta.items(), grads, strict=True)}
    small.assert_near(end.personal, w)
    small.assert_near(
        select_prefix(end.shared, ".adapter.."), {n: t.detach() for n, t in theta.items()}
    )


@pytest.mark.parametrize("place", ["matrix", "conv"])
@pytest.mark.parametrize("network", ["cnn", "bn_net", "cnn5"])
def test_an_adapter_folded_into_the_weights_is_the_adapter_beside_them(place, network):
    model = small.make_model(
        network, shape=(3, 32, 32) if network == "cnn5" else small.SHAPE
    ).eval_mode()
    adapter = Adapter(place, 3, 0.6)
    theta = {
        n: torch.randn(t.shape, generator=rng(2, n))
        for n, t in adapter.init(model, rng(1, "init")).items()
    }
    x = torch.randn(4, *model.shape, generator=rng(3, "x"))
    beside = adapter.logits(model, model.initial, theta, x)
    folded = model(adapter.merge(model, model.initial, theta), x)
    torch.testing.assert_close(folded, beside, rtol=1e-4, atol=1e-4)
    assert (folded - model(model.initial, x)).abs().max() > 1e-2
    z = model.features(model.initial, x)
    assert torch.equal(adapter.logits(model, model.initial, theta, x, z), beside)


def test_an_adapter_alone_trains_as_a_classifier_of_still_features():
    algorithm = of("alone", adapter_epochs=3)
    made = small.make_trainer(algorithm, train=replace(small.TRAIN, momentum=0.0))
    v = woken(small.initial_variables(made))
    _, second = algorithm.local(made.model, made.settings, 0)
    _, end = trained(replace(made, transport=Transport(OnePhase(second))), v)
    theta = {n: t.clone() for n, t in select_prefix(v.shared, ".adapter..").items()}
    for epoch in range(3):
        for _, stacked in made.feed.epoch([0], 0, epoch).batches(
            range(0, small.SIZES[0], small.TRAIN.batch_size)
        ):
            x, y = stacked.x[0], stacked.y[0]
            theta = {n: t.detach().requires_grad_() for n, t in theta.items()}
            z = made.model.features(v.personal, x)
            loss = F.cross_entropy(F.linear(F.linear(z, theta["A"]), theta["B"]), y)
            grads = torch.autograd.grad(loss, list(theta.values()))
            theta = {
                n: t - small.TRAIN.lr * g for (n, t), g in zip(theta.items(), grads, strict=True)
            }
    small.assert_near(
        select_prefix(end.shared, ".adapter.."), {n: t.detach() for n, t in theta.items()}
    )
    assert not moved(v.personal, end.personal)


def test_the_conv_adapter_is_a_convolution_of_r_channels_and_one_of_size_1():
    model = small.make_model("bn_net").eval_mode()
    adapter, name = Adapter("conv", 2, 0.6), "conv1.weight"
    assert adapter.weight_name(model) == name
    theta = {
        n: torch.randn(t.shape, generator=rng(2, n))
        for n, t in adapter.init(model, rng(1, "init")).items()
    }
    x = torch.randn(4, *model.shape, generator=rng(3, "x"))
    change = adapter.merge(model, model.initial, theta)[name] - model.initial[name]
    A, B = theta["A"], theta["B"][:, :, None, None]
    torch.testing.assert_close(
        F.conv2d(x, change, padding=1), 0.6 * F.conv2d(F.conv2d(x, A, padding=1), B)
    )


def test_an_adapter_begins_without_effect_and_with_the_bounds_of_torchs_linear():
    model = zoo.build("cnn5", {}, 10, (3, 32, 32), 1)
    for place, width in (("matrix", 500), ("conv", 75), ("side", 3072)):
        theta = Adapter(place, 64).init(model, rng(1, "init"))
        bound = width**-0.5
        assert not theta["B"].any() and 0.97 * bound < theta["A"].abs().max() <= bound
        assert abs(theta["A"].std() / (bound / 3**0.5) - 1) < 0.03


def test_mu_rises_by_its_schedule():
    def shares(round_, **fields):
        """How much of either loss the first phase has: solved from losses of 2 and 5."""
        made = small.make_trainer(of("matrix", **fields))
        v, data = woken(small.initial_variables(made)), batch(made)
        loss = made.algorithm.local(made.model, made.settings, round_)[0].steps[0].loss(v, v, data)
        alone = F.cross_entropy(made.model(v.personal, data.x), data.y)
        theta = select_prefix(v.shared, ".adapter..")
        combined = F.cross_entropy(
            Adapter("matrix", 2).logits(made.model, v.personal, theta, data.x), data.y
        )
        return float((loss - alone) / (combined - alone))

    linear = {"mu_schedule": "linear", "mu_rounds": 10, "mu": 0.5}
    assert [round(shares(t, **linear), 4) for t in (0, 1, 4, 5, 6, 100)] == [
        0.0,
        0.1,
        0.4,
        0.5,
        0.5,
        0.5,
    ]
    assert [round(shares(t, mu=0.3), 4) for t in (0, 7)] == [0.3, 0.3]
    assert [round(shares(t, **linear, mu_on="model"), 4) for t in (0, 4, 6)] == [1.0, 0.6, 0.5]


# --- what is judged


@every_place
@pytest.mark.parametrize("inference", ["model", "combined"])
def test_the_judged_model_is_the_network_with_or_without_the_adapter(place, inference):
    algorithm = of(place, inference=inference, scale=0.8)
    made = small.make_trainer(algorithm)
    v, data = woken(small.initial_variables(made)), batch(made)
    theta = select_prefix(v.shared, ".adapter..")
    if inference == "model":
        expected = plain_network(made.model, v.personal, data)
    elif place == "alone":  # the head and mu times the adapter
        expected = plain("matrix", made.model, v.personal, theta, data, 0.8 * algorithm.mu)
    else:
        expected = plain(place, made.model, v.personal, theta, data, 0.8)
    torch.testing.assert_close(
        algorithm.logits(made.model.eval_mode(), v, data.x), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "place, inference",
    [
        ("matrix", "combined"),
        thorough_param("conv", "combined"),
        ("side", "model"),
        thorough_param("alone", "combined"),
        thorough_param("matrix", "model"),
    ],
)
def test_a_clients_model_of_a_run_has_the_accuracy_after_aggregation(place, inference, tmp_path):
    how = (
        f"algorithm={{name: pfedlora, adapter: {place}, inference: {inference}, adapter_epochs: 2}}"
    )
    assert main(["run", str(TINY), how, "rounds=2", f"output={tmp_path / 'run'}"]) == 0
    run = open_run(tmp_path / "run")
    config = from_dict(run.config, "log")
    data, device = load_data(config, "log"), torch.device("cpu")
    feed = Feed(data, run.partition, seed=config.seed, shift="none", device=device, augment=False)
    for client in range(7):
        x, y = (t[0] for t in feed.test_batch([client], 0, feed.test_size(client))[:2])
        right = run.client(client).model(x).argmax(1) == y
        assert (
            np.float32(right.double().mean())
            == run.array("clients/accuracy_aggregated")[-1][client]
        )
    judged, after = (run.array(f"clients/{name}")[-1] for name in ("accuracy", "accuracy_trained"))
    assert (
        np.array_equal(judged[~np.isnan(after)], after[~np.isnan(after)])
        and (~np.isnan(after)).sum() == 4
    )
    name = build_tiny(how).federation.clients.types[0].trainer.model.head + ".weight"
    merged = not np.array_equal(run.client(0).weights[name], run.client(0).personal[name])
    assert merged == (place in ("matrix", "alone") and inference == "combined")


def test_a_side_adapter_judged_with_the_network_has_no_weights_of_its_own_and_says_so(tmp_path):
    how = "algorithm={name: pfedlora, adapter: side, inference: combined}"
    assert main(["run", str(TINY), how, "rounds=1", f"output={tmp_path / 'run'}"]) == 0
    view = open_run(tmp_path / "run").client(0)
    with pytest.raises(ValueError, match="adapter = side"):
        view.model


# --- two ways to the same numbers


@every_place
@pytest.mark.parametrize("network", ["cnn", thorough_param("bn_net"), thorough_param("noisy_net")])
def test_the_loop_is_the_stack(place, network):
    ends = []
    for stacked in (False, True):
        federation, state = small.make_experiment(
            of(place, adapter_epochs=2), network, stacked=stacked, fine=True
        )
        ends.append(small.run_rounds(federation, state, 2))
    small.assert_near(ends[0].shared, ends[1].shared, 1e-6)
    small.assert_near(ends[0].personal, ends[1].personal, 1e-6)


# --- mistakes


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"mu": 1.5}, "mu = 1.5: must be"),
        ({"mu": -0.1}, "mu = -0.1: must be"),
        ({"mu": 0.6, "adapter": "alone"}, "mu = 0.6: must be at most 0.5 with adapter = alone"),
        ({"mu_rounds": 0}, "mu_rounds = 0: must be"),
        ({"adapter_epochs": -1}, "adapter_epochs = -1: must be"),
        ({"lora_rank": 0}, "lora_rank = 0: must be"),
        ({"scale": 0.0}, "scale = 0.0: must be"),
    ],
)
def test_impossible_settings_are_refused(fields, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        PFedLoRA(**fields)


def test_a_network_without_a_place_for_the_adapter_is_refused(capsys):
    conv = "algorithm={name: pfedlora, adapter: conv}"
    assert main(["plan", str(TINY), conv, "model=small:linear_net"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and f"{TINY}: algorithm.adapter = conv: needs" in err
    model = zoo.build("small:linear_net", {}, 6, small.SHAPE, 1)
    with pytest.raises(ValueError, match="^adapter = conv: needs a network with a convolution"):
        PFedLoRA(adapter="conv").check(model, small.TRAIN)
    model = zoo.build("small:conv_net", {}, 6, small.SHAPE, 1)
    for place in ("matrix", "side", "alone"):
        with pytest.raises(
            ValueError, match=f"^adapter = {place}: needs a network with a Linear at its end"
        ):
            PFedLoRA(adapter=place).check(model, small.TRAIN)
