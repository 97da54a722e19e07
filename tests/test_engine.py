"""Local training and evaluation: loop against stack, both against torch.optim, and where a worker
computes.
"""

from dataclasses import dataclass, replace

import pytest
import small
import torch
import torch.nn.functional as F
from tiers import thorough_param

from fedlora_mpi.algorithm import Algorithm, LocalTraining, Phase, Sgd, Step, Variables, Visit
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedlora import FedLoRA
from fedlora_mpi.algorithms.local import Local
from fedlora_mpi.core.seeds import isolate_rng, rng
from fedlora_mpi.engine.device import choose_path, select_device
from fedlora_mpi.engine.flops import Flops
from fedlora_mpi.engine.settings import Engine
from fedlora_mpi.engine.walk import sgd_step

PATHS = pytest.mark.parametrize("stacked", [False, True], ids=["loop", "stack"])
CLIENTS = range(len(small.SIZES))


def numbers(*shape, at=0):
    return torch.randn(*shape, generator=rng(1, "test", *shape, at))


def begun(made, moved=True):
    """(shared, personal rows) of all clients, the rows apart from one another."""
    start = small.initial_variables(made)
    personal_C = small.repeat_rows(start.personal, len(CLIENTS))
    if moved:
        personal_C = {n: v + 0.01 * numbers(*v.shape).abs() for n, v in personal_C.items()}
    return start.shared, personal_C


def trained(made, clients=CLIENTS, round_=0):
    """{client: its variables at the end as one tree};
    the rows of ``begun`` are the clients' own."""
    shared, personal_C = begun(made)
    rows = {n: v[list(clients)] for n, v in personal_C.items()}
    results = made.train(clients, shared, rows, round_)
    return {
        done.client: small.clone_tree(done.end.shared | done.end.personal) | {"loss": done.loss}
        for done in results
    }


@dataclass(frozen=True)
class Phased(FedAvg):
    """FedAvg in the phases that it is given, as (epochs, settings of the phase or its step)."""

    parts: tuple = ()

    def local(self, model, train, round_):
        def phase(epochs, constant=None, **step):
            return Phase(epochs, (Step(**{"loss": self.loss(model), **step}),), constant)

        return tuple(phase(epochs, **more) for epochs, more in self.parts)


# The two paths


@pytest.mark.parametrize("network", [thorough_param("cnn"), "bn_net", "noisy_net"])
@pytest.mark.parametrize(
    "algorithm", [FedAvg(), FedLoRA(bn_stats="local"), Local()], ids=lambda a: type(a).__name__
)
def test_loop_and_stack_train_alike(network, algorithm):
    settings = replace(small.TRAIN, weight_decay=0.01)
    loop, stack = (
        trained(small.make_trainer(algorithm, network, train=settings, stacked=stacked))
        for stacked in (False, True)
    )
    assert list(loop) == list(stack) == list(CLIENTS)
    for client in CLIENTS:
        small.assert_near(stack[client], loop[client])
    some = next(iter(loop[0]))
    assert not torch.equal(loop[0][some], loop[1][some])


@pytest.mark.parametrize("network", [thorough_param("cnn"), "bn_net", "noisy_net"])
def test_loop_and_stack_evaluate_alike(network):
    tests = (304, 9, 251, 5, 407)  # a stack of five tests 200 samples of each at a time
    tables = []
    for stacked in (False, True):
        made = small.make_trainer(
            FedLoRA(bn_stats="local"),
            network,
            stacked=stacked,
            samples=small.make_feed(tests=tests),
        )
        tables.append(made.evaluate(CLIENTS, *begun(made)))
    loop, stack = tables
    assert loop.shape == (5, 2) and loop.dtype == torch.float64
    torch.testing.assert_close(stack, loop, rtol=1e-5, atol=1e-6)
    assert len(set(loop[:, 1].tolist())) == 5
    made = small.make_trainer(
        FedLoRA(bn_stats="local"), network, samples=small.make_feed(tests=tests)
    )
    shared, personal_C = begun(made)
    for client in CLIENTS:
        v = Variables(shared, {n: value[client] for n, value in personal_C.items()})
        batch = made.feed.test_batch([client], 0, tests[client])
        logits = made.algorithm.logits(made.model.eval_mode(), v, batch.x[0])
        expected = [
            (logits.argmax(1) == batch.y[0]).double().mean(),
            F.cross_entropy(logits, batch.y[0]),
        ]
        assert loop[client].tolist() == pytest.approx([float(v) for v in expected], rel=1e-5)


@pytest.mark.parametrize("network", ["bn_net", "noisy_net"])
def test_a_client_does_not_depend_on_its_group(network):
    for stacked in (False, True):
        made = small.make_trainer(FedLoRA(), network, stacked=stacked)
        whole = trained(made)
        for part in ([0], [1, 3], [0, 2, 4], [4]):
            for client, alone in trained(made, part).items():
                if stacked:
                    small.assert_near(alone, whole[client])
                else:
                    assert small.trees_equal(alone, whole[client])


@PATHS
def test_training_follows_round_and_seed(stacked):
    made = small.make_trainer(FedAvg(), "noisy_net", stacked=stacked)
    one, again, next_round = trained(made), trained(made), trained(made, round_=1)
    other_seed = trained(replace(made, feed=small.make_feed(seed=2)))
    for client in CLIENTS:
        assert small.trees_equal(one[client], again[client])
        assert not torch.equal(one[client]["0.weight"], next_round[client]["0.weight"])
        assert not torch.equal(one[client]["0.weight"], other_seed[client]["0.weight"])


@PATHS
def test_nothing_given_is_written_to(stacked):
    made = small.make_trainer(FedLoRA(bn_stats="local"), "bn_net", stacked=stacked)
    shared, personal_C = begun(made)
    before = small.clone_tree(shared), small.clone_tree(personal_C)
    starts = [done.start for done in made.train(CLIENTS, shared, personal_C, 0)]
    made.evaluate(CLIENTS, shared, personal_C)
    assert small.trees_equal(shared, before[0]) and small.trees_equal(personal_C, before[1])
    for client, start in enumerate(starts):
        assert small.trees_equal(start.shared, shared)
        assert small.trees_equal(start.personal, {n: v[client] for n, v in personal_C.items()})


@PATHS
def test_training_reads_no_global_generator(stacked):
    before = torch.get_rng_state()
    trained(small.make_trainer(FedLoRA(), "noisy_net", stacked=stacked))
    assert torch.equal(torch.get_rng_state(), before)


# Against plain torch


def by_torch(made, client, parts):
    """FedAvg's local training of one client with an nn.Module and torch.optim.SGD; (leaves, last
    loss).

    parts: (epochs, names of the trained parameters or None for all, optimizer settings) of each
    phase.
    """
    with isolate_rng(2, "other weights"):
        module = getattr(small, "cnn" if "9.weight" in made.model.leaves else "bn_net")(
            small.CLASSES, small.SHAPE
        )
    module.load_state_dict(made.model.initial, strict=False)
    module.train().to(memory_format=torch.channels_last)
    size, width, number = made.feed.train_size(client), made.settings.batch_size, 0
    for epochs, names, settings in parts:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(names is None or name in names)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], **settings)
        for _ in range(epochs):
            epoch, total = made.feed.epoch([client], 0, number), 0.0
            for at in range(0, size, width):
                batch = epoch.batch(1, at, min(width, size - at))
                optimizer.zero_grad()
                loss = F.cross_entropy(module(batch.x[0]), batch.y[0])
                loss.backward()
                optimizer.step()
                total += loss.detach() * batch.y.shape[1]
            number += 1
    state = module.state_dict()
    return {n: state[n].contiguous() for n in made.model.leaves}, total / size


def of(settings):
    return {"lr": settings.lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay}


@pytest.mark.parametrize("network", ["cnn", "bn_net"])
@pytest.mark.parametrize(
    "momentum, weight_decay", [(0.0, 0.0), (0.9, 0.0), (0.9, 0.01), (0.0, 0.01)]
)
def test_the_loop_is_torch_optim_to_the_bit(network, momentum, weight_decay):
    settings = LocalTraining(3, 5, 0.05, momentum, weight_decay)
    made = small.make_trainer(
        FedAvg(), network, train=settings, samples=small.make_feed(sizes=(12, 7, 3))
    )
    results = trained(made, range(3))
    for client in range(3):
        expected, loss = by_torch(made, client, [(3, None, of(settings))])
        assert torch.equal(results[client].pop("loss"), loss)
        assert small.trees_equal(results[client], expected)


@PATHS
def test_phases_train_their_leaves_with_fresh_momentum_and_their_own_settings(stacked):
    head = {"fc.weight", "fc.bias"}
    parts = (
        (2, {}),
        (
            2,
            {
                "trains": lambda leaf: leaf in head,
                "sgd": lambda sgd: sgd._replace(lr=3 * sgd.lr, weight_decay=0.1),
            },
        ),
        (1, {"sgd": lambda sgd: Sgd(sgd.lr / 2)}),
    )
    made = small.make_trainer(
        Phased(parts=parts), "bn_net", stacked=stacked, samples=small.make_feed(sizes=(12,))
    )
    common = {"lr": 0.05, "momentum": 0.9}
    expected, loss = by_torch(
        made,
        0,
        [
            (2, None, common),
            (2, head, {**common, "lr": 3 * 0.05, "weight_decay": 0.1}),
            (1, None, {"lr": 0.025}),
        ],
    )
    (result,) = trained(made, [0]).values()
    small.assert_near(result, expected | {"loss": loss})
    if not stacked:
        assert small.trees_equal(result, expected | {"loss": loss})


@PATHS
def test_a_phase_without_epochs_moves_nothing_and_no_batch(stacked):
    def never(now, start, batch):
        raise AssertionError("a phase without epochs asked for its loss")

    empty = (0, {"loss": never, "constant": lambda v: never(v, v, None)})
    plain, padded = (
        trained(small.make_trainer(Phased(parts=parts), "bn_net", stacked=stacked))
        for parts in (((1, {}), (2, {})), (empty, (1, {}), empty, (2, {}), empty))
    )
    assert all(small.trees_equal(plain[client], padded[client]) for client in CLIENTS)


@PATHS
def test_without_phases_nothing_moves(stacked):
    made = small.make_trainer(Phased(), "bn_net", stacked=stacked)
    for tree in trained(made).values():
        assert tree.pop("loss") == 0 and small.trees_equal(tree, made.model.initial)


@PATHS
def test_weight_decay_alone_shrinks_geometrically(stacked):
    def none(now, start, batch):
        return sum(v.sum() for v in now.shared.values()) * 0

    made = small.make_trainer(
        Phased(parts=((2, {"loss": none}),)),
        train=LocalTraining(2, 5, lr=0.5, momentum=0.0, weight_decay=0.2),
        stacked=stacked,
    )
    for client, tree in trained(made).items():
        steps = 2 * -(-small.SIZES[client] // 5)
        small.assert_near(
            {n: tree[n] for n in made.model.initial},
            {n: v * 0.9**steps for n, v in made.model.initial.items()},
        )


@PATHS
def test_the_start_of_the_round_stays_within_reach_of_a_loss(stacked):
    def pull(now, start, batch):
        return sum(((v - start.shared[n]) ** 2).sum() for n, v in now.shared.items()) / 2

    def drift(now, start, batch):
        return sum(v.sum() for v in now.shared.values())

    parts = ((1, {"loss": drift}), (1, {"loss": pull}))
    made = small.make_trainer(
        Phased(parts=parts), train=LocalTraining(2, 11, lr=0.5, momentum=0.0), stacked=stacked
    )
    for tree in trained(made).values():  # one step by -0.5, then half of the way back
        for name, value in made.model.initial.items():
            torch.testing.assert_close(tree[name], value - 0.25, rtol=0, atol=1e-6)


@PATHS
def test_a_constant_is_computed_once_from_each_clients_own_variables(stacked):
    seen = []

    @dataclass(frozen=True)
    class Pulled(Local):
        def local(self, model, train, round_):
            def constant(v):
                seen.append(1)
                return {n: 3 * w for n, w in v.personal.items()}

            def toward(now, start, batch):
                return sum(((w - now.constant[n]) ** 2).sum() for n, w in now.personal.items()) / 2

            return (Phase(2, (Step(toward),), constant=constant),)

    made = small.make_trainer(
        Pulled(), train=LocalTraining(2, 11, lr=0.5, momentum=0.0), stacked=stacked
    )
    _, personal_C = begun(made)
    for client, tree in trained(made).items():  # w, then (w + 3 w) / 2 = 2 w, then (2 w + 3 w) / 2
        small.assert_near(
            {n: tree[n] for n in personal_C}, {n: 2.5 * v[client] for n, v in personal_C.items()}
        )
    assert len(seen) == (1 if stacked else len(CLIENTS))


@dataclass(frozen=True)
class Visited(Algorithm):
    """w <- 2 w + 1 twice, + 1 by SGD, 10 w + w_start, + 2 by SGD, 10 w + w_start; ``rows``: how many
    samples the visits before and after SGD are given; ``held``: how many the client has.
    """

    def init(self, model, rng):
        zeros = {n: torch.zeros(size) for n, size in (("w", 1), ("rows", 2), ("held", 1))}
        return Variables({}, zeros)

    def local(self, model, train, round_):
        def rows_of(data):
            return torch.as_tensor(len(data.y) if data.real is None else data.real.sum())

        def before(start, now, data):
            own = now.personal
            held = data.counts.sum()[None].to(own["held"])
            rows = torch.stack([rows_of(data), own["rows"][1]])
            return Variables(
                {}, {"w": own["w"] + start.personal["w"] + 1, "rows": rows, "held": held}
            )

        def between(start, now, data):
            own = now.personal
            rows = torch.stack([own["rows"][0], rows_of(data).to(own["rows"])])
            return Variables({}, own | {"w": 10 * own["w"] + start.personal["w"], "rows": rows})

        def up(now, start, batch):
            return -now.personal["w"].sum()

        step = Step(up, "w".__eq__)
        first, later = Visit(before), Visit(between, all_data=True)
        return first, first, Phase(1, (step,)), later, Phase(2, (step,)), later


@PATHS
def test_visits_and_phases_happen_in_their_order(stacked):
    train = LocalTraining(1, 100, lr=1.0, momentum=0.0)
    made = small.make_trainer(Visited(), train=train, stacked=stacked)
    rows_C = small.repeat_rows(small.initial_variables(made).personal, len(CLIENTS))
    results = list(made.train(CLIENTS, {}, rows_C, 0))
    assert [done.client for done in results] == [*CLIENTS]
    for done in results:
        size = small.SIZES[done.client]
        assert done.start.personal["w"] == 3 and done.start.personal["rows"].tolist() == [1, 0]
        assert done.end.personal["w"] == 10 * (10 * 4 + 3 + 2) + 3
        assert done.end.personal["rows"].tolist() == [1, size]
        assert done.end.personal["held"] == size
        assert not any(v.requires_grad for v in done.end.personal.values())
    assert not rows_C["w"].any()


@pytest.mark.parametrize(
    "settings", [Sgd(0.3), Sgd(0.3, 0.9), Sgd(0.3, 0.0, 0.1), Sgd(0.3, 0.9, 0.1)]
)
def test_a_step_is_that_of_torch_optim(settings):
    ours = [numbers(3, 5), numbers(7)]
    theirs = [torch.nn.Parameter(v.clone()) for v in ours]
    momenta = [torch.zeros_like(v) for v in ours]
    optimizer = torch.optim.SGD(theirs, **settings._asdict())
    for at in range(3):
        grads = [numbers(3, 5, at=at), numbers(7, at=at)]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        kept = [g.clone() for g in grads]
        sgd_step(ours, grads, momenta, settings)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))


def test_running_statistics_are_never_trained():
    def loss(now, start, batch):
        return sum(v.sum() for v in now.shared.values())

    made = small.make_trainer(Phased(parts=((1, {"loss": loss}),)), "bn_net")
    for tree in trained(made).values():
        moved = {n: not torch.equal(tree[n], v) for n, v in made.model.initial.items()}
        assert moved == {n: made.model.role(n) != "stats" for n in moved}


@PATHS
def test_a_last_batch_of_one_sample_on_1x1_maps_trains(stacked):
    def trained_on(size):
        made = small.make_trainer(
            FedAvg(), "bn_net", stacked=stacked, samples=small.make_feed(sizes=(size,))
        )
        deep = small.make_model("test_engine:deep_net")
        return trained(replace(made, model=deep), [0])[0]

    assert all(torch.isfinite(v).all() for v in trained_on(11).values())
    assert all(torch.isfinite(v).all() for v in trained_on(1).values())


def deep_net(classes, shape):
    """Its last maps are 1x1."""
    return small.ResNet(classes, shape[0], (3, 5, 2, 3), imagenet_stem=False)


# Where a worker computes


@pytest.mark.parametrize(
    "engine, device, flops, batch, clients, expected",
    [
        # below 8 MFLOP a batch; at most half of the clients
        (Engine(), "cpu", 79_999, 100, 5, ("stack", 3)),
        (Engine(), "cpu", 80_000, 100, 5, ("loop", 1)),
        (Engine(), "cpu", 80_000, 99, 5, ("stack", 3)),
        (Engine(), "cuda", 80_000, 100, 5, ("stack", 3)),
        (Engine(), "cpu", 1, 1, 40, ("stack", 20)),
        (Engine(), "cpu", 1, 1, 60, ("stack", 25)),
        (Engine(), "cpu", 1, 1, 2, ("stack", 1)),
        (Engine(), "cpu", 1, 1, 1, ("stack", 1)),
        (Engine(path="loop"), "cpu", 1, 1, 40, ("loop", 1)),
        (Engine(path="stack"), "cpu", 10**9, 100, 7, ("stack", 4)),
        (Engine(path="loop", group_size=7), "cpu", 1, 1, 40, ("loop", 7)),
        (Engine(group_size=7), "cpu", 1, 1, 5, ("stack", 7)),
    ],
)
def test_the_path_follows_from_the_workload(engine, device, flops, batch, clients, expected):
    model = replace(small.make_model(), flops=flops)
    assert choose_path(engine, device, model, batch, clients) == expected
    assert choose_path(engine, device, model, batch, clients) == expected


@pytest.fixture
def threads():
    """The number of torch's threads, put back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_worker_gets_its_device_and_threads():
    assert select_device(Engine(device="cpu", threads=2), 3) == torch.device("cpu")
    assert torch.get_num_threads() == 2
    assert select_device(Engine(), None) == torch.device("cpu")  # a rank that hosts no client
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("threads")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(
        ValueError, match="engine.device = cuda: torch sees no GPU here; engine.device=cpu or auto"
    ):
        select_device(Engine(device="cuda"), 0)
    assert select_device(Engine(), 0) == torch.device("cpu")


@pytest.mark.usefixtures("threads")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_workers_of_a_node_are_dealt_over_its_gpus():
    count = torch.cuda.device_count()
    assert [select_device(Engine(), worker).index for worker in range(count + 1)] == [
        *range(count),
        0,
    ]


@pytest.mark.parametrize(
    "fields, text", [({"group_size": 0}, "group_size = 0"), ({"threads": 0}, "threads = 0")]
)
def test_impossible_engine_settings_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        Engine(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"weight_decay": -0.1},
    ],
)
def test_impossible_training_settings_are_refused(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"{name} = {value}: must be"):
        LocalTraining(**fields)


@pytest.mark.parametrize("network", ["cnn", "bn_net"])
def test_the_defaults_of_an_algorithm_are_fedavg(network):
    plain, fedavg = (small.final_state(a, network) for a in (Algorithm(), FedAvg()))
    assert small.trees_equal(plain.shared, fedavg.shared) and not plain.personal


# Samples that are held out


@dataclass(frozen=True)
class Adds(Algorithm):
    """Adds up the inputs of its two phases: one on held-out samples (at most ``limit``), one on the
    others.
    """

    held_out: float = 0.3
    limit: int = 100

    def init(self, model, rng):
        return Variables({}, {n: torch.zeros(small.SHAPE) for n in ("held", "rest")})

    def local(self, model, train, round_):
        def adding(name):
            def loss(now, start, batch):
                real = 1 if batch.real is None else batch.real[:, None, None, None]
                return -(now.personal[name] * (batch.x * real).sum(0)).sum()

            return (Step(loss, name.__eq__, lambda _: Sgd(1.0)),)

        return Phase(1, adding("held"), limit=lambda n: self.limit, held_out=True), Phase(
            2, adding("rest")
        )


@PATHS
@pytest.mark.parametrize("limit", [100, 1])
def test_a_phase_sees_the_samples_that_are_held_out_or_the_others(stacked, limit):
    made = small.make_trainer(
        Adds(limit=limit), stacked=stacked, samples=small.make_feed(sizes=(11, 7, 3, 1))
    )
    start = small.initial_variables(made)
    for done in made.train(range(4), {}, small.repeat_rows(start.personal, 4), 2):
        for name, epochs in (("held", (0,)), ("rest", (1, 2))):
            expected = torch.zeros(small.SHAPE)
            for number in epochs:
                epoch = made.feed.epoch([done.client], 2, number, 0.3, name == "held")
                width = min(epoch.sizes[0], limit if name == "held" else 100)
                assert (
                    width
                    == {
                        "held": min(limit, (3, 2, 1, 0)[done.client]),
                        "rest": (8, 5, 2, 1)[done.client],
                    }[name]
                )
                if width:
                    expected += epoch.batch(1, 0, width).x[0].sum(0)
            assert torch.allclose(done.end.personal[name], expected, atol=1e-4), (done.client, name)


def test_the_cost_of_a_round_is_that_of_the_samples_that_are_used():
    @dataclass(frozen=True)
    class Twice(FedAvg):
        held_out: float = 0.2

        def local(self, model, train, round_):
            (phase,) = super().local(model, train, round_)
            return phase._replace(held_out=True), phase

    costs = [
        Flops(made, small.initial_variables(made))
        for made in (small.make_trainer(Twice()), small.make_trainer(FedAvg()))
    ]
    assert costs[0].round_flops(30, 0) == costs[1].round_flops(6, 0) + costs[1].round_flops(24, 0)
