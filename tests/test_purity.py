"""Networks whose forward passes leave something behind: what is kept, what is put away, what is
refused.
"""

import copy
import itertools
import random
import time
from unittest.mock import patch

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedlora_mpi.core.seeds import global_states, isolate_rng, rng
from fedlora_mpi.models.effects import Effects
from fedlora_mpi.models.network import from_module
from fedlora_mpi.models.zoo import build

WIDTH, CLASSES, SHAPE = 5, 3, (1, 2, 3)


def numbers(*shape, at=0):
    return torch.randn(*shape, generator=rng(1, "test", *shape, at))


class Net(nn.Module):
    """Six pixels, ``step`` on five features, three classes."""

    def __init__(self, classes=CLASSES, shape=SHAPE):
        super().__init__()
        self.body = nn.Linear(6, WIDTH)
        self.head = nn.Linear(WIDTH, classes)
        self.begin()

    def begin(self):
        pass

    def step(self, z):
        return z

    def forward(self, x):
        return self.head(self.step(torch.tanh(self.body(x.flatten(1)))))


def network(step, begin=lambda self: None):
    """A ``Net`` whose class has these two."""
    with isolate_rng(1, "test"):
        return type("Made", (Net,), {"step": step, "begin": begin})()


def made(step, begin=lambda self: None):
    return from_module(network(step, begin), CLASSES, SHAPE)


# What is refused


class Meter:
    """An object of the user's that counts."""

    def __init__(self):
        self.count = 0


TICKS = 0
DRAWS = np.random.default_rng(1)


def ticking(self, z):
    global TICKS
    TICKS += 1
    return z


def setting(**values):
    """A ``begin`` that sets these attributes, made anew for each network."""
    return lambda self: vars(self).update(copy.deepcopy(values))


def buffering(**values):
    """A ``begin`` that registers these buffers."""

    def begin(self):
        for name, value in values.items():
            self.register_buffer(name, value.clone())

    return begin


def count(self, z):
    self.calls += 1
    return z


def count_in_training(self, z):
    self.calls += self.training
    return z


def previous(self, z):
    last, self.last = self.last, z.detach()
    return z if last is None else z + last


def difference(self, z):
    last, self.last = self.last, z.detach()
    return z if last is None else z + 9 * (z - last)


def first_sets_the_scale(self, z):
    if not self.ready:
        self.scale, self.ready = z.detach().std(), True
    return z / self.scale


def toggled(self, z):
    self.flag = not self.flag
    return z if self.flag else -z


def late_parameter(self, z):
    if self.training:
        self.scale = nn.Parameter(torch.ones(WIDTH))
    return z * getattr(self, "scale", 1)


def owning(self):
    self.square, self.own = nn.Parameter(torch.eye(WIDTH)), []
    self.own.append(self.square)


def hooked(self):
    self.kept = {}
    self.body.register_forward_hook(lambda module, given, z: self.kept.update(z=z))


def item(name, key):
    """A step that adds 1 to an entry."""

    def step(self, z):
        getattr(self, name)[key] += 1
        return z

    return step


def adding(call):
    """A step that adds what ``call(self, z)`` gives to the features."""
    return lambda self, z: z + call(self, z)


REFUSED = {
    "a Python counter": (
        count,
        setting(calls=0),
        "attribute calls each time.*register|float buffer",
    ),
    "a counter in training alone": (
        count_in_training,
        setting(calls=0),
        "training changes attribute calls",
    ),
    "a counter in a dict": (
        item("told", "calls"),
        setting(told={"calls": 0}),
        r"attribute told\['calls'\]",
    ),
    "a counter of an object": (
        lambda self, z: (setattr(self.meter, "count", self.meter.count + 1), z)[1],
        setting(meter=Meter()),
        "attribute meter.count",
    ),
    "a counter of the class": (
        lambda self, z: (setattr(type(self), "calls", type(self).__dict__.get("calls", 0) + 1), z)[
            1
        ],
        setting(),
        "class attribute Made.calls",
    ),
    "a counter of the module's file": (ticking, setting(), "variable TICKS"),
    "an iterator": (
        adding(lambda self, z: next(self.number)),
        setting(number=itertools.count()),
        "attribute number",
    ),
    "an average in Python": (
        lambda self, z: (setattr(self, "mean", 0.9 * self.mean + 0.1 * z.mean().item()), z)[1],
        setting(mean=0.0),
        "attribute mean",
    ),
    "an integer buffer, in place": (
        lambda self, z: (self.calls.add_(1), z)[1],
        buffering(calls=torch.tensor(0)),
        "buffer calls.*float buffer",
    ),
    "an integer buffer, assigned": (
        lambda self, z: (setattr(self, "calls", self.calls + 1), z)[1],
        buffering(calls=torch.tensor([0])),
        "buffer calls",
    ),
    "a warm-up that counts in a tensor": (
        lambda self, z: z if self.steps.add_(1) < 40 else -z,
        setting(steps=torch.zeros(())),
        "changes attribute steps each time",
    ),
    "a default that is made once": (
        lambda self, z, memo=[0]: z if memo.append(memo.pop() + 1) or memo[0] < 40 else -z,
        setting(),
        "changes variable memo",
    ),
    "the features of the pass before": (previous, setting(last=None), "depends on attribute last"),
    "how far they moved": (difference, setting(last=None), "depends on attribute last"),
    "a scale of the first batch": (
        first_sets_the_scale,
        setting(ready=False),
        "(depends on|changes) attribute (ready|scale)",
    ),
    "a toggle": (toggled, setting(flag=False), "attribute flag"),
    "a queue": (
        lambda self, z: (
            z
            + (self.queue.append(z.detach()) or torch.stack([q.mean() for q in self.queue]).mean())
        ),
        setting(queue=[]),
        "depends on attribute queue",
    ),
    "an average in a tensor": (
        lambda self, z: z + self.mean.mul_(0.9).add_(z.mean()),
        setting(mean=torch.zeros(())),
        "(depends on|changes) attribute mean",
    ),
    "Python's generator": (
        adding(lambda self, z: random.random()),
        setting(),
        "from Python's global generator",
    ),
    "numpy's generator": (
        adding(lambda self, z: float(np.random.rand())),
        setting(),
        "from numpy's global generator",
    ),
    "torch.randn_like": (
        adding(lambda self, z: torch.randn_like(z)),
        setting(),
        "training draws|evaluation draws",
    ),
    "torch.rand in evaluation": (
        adding(lambda self, z: 0 if self.training else torch.rand(z.shape)),
        setting(),
        "in evaluation draws random numbers from torch's",
    ),
    "torch.randperm in training": (
        lambda self, z: z[:, torch.randperm(WIDTH)] if self.training else z,
        setting(),
        "from torch's global generator",
    ),
    "torch.randint": (
        adding(lambda self, z: torch.randint(3, (1,))),
        setting(),
        "from torch's global generator",
    ),
    "normal_": (
        adding(lambda self, z: torch.empty(WIDTH).normal_()),
        setting(),
        "from torch's global generator",
    ),
    "dropout in evaluation": (
        lambda self, z: F.dropout(z, 0.5),
        setting(),
        "in evaluation draws random numbers from torch's.*training=self.training",
    ),
    "a generator of torch": (
        adding(lambda self, z: torch.rand(WIDTH, generator=self.g)),
        lambda self: vars(self).update(g=torch.Generator()),
        "attribute g, a generator",
    ),
    "a generator of numpy": (
        adding(lambda self, z: self.g.random()),
        lambda self: vars(self).update(g=np.random.default_rng(1)),
        "attribute g, a generator",
    ),
    "a RandomState": (
        adding(lambda self, z: self.g.rand()),
        lambda self: vars(self).update(g=np.random.RandomState(1)),
        "attribute g, a generator",
    ),
    "a generator of Python": (
        adding(lambda self, z: self.g.random()),
        lambda self: vars(self).update(g=random.Random(1)),
        "attribute g, a generator",
    ),
    "a generator of the file": (
        adding(lambda self, z: DRAWS.random()),
        setting(),
        "variable DRAWS, a generator",
    ),
    # nanoseconds: of whole seconds since the start of a machine that has run for a day, two
    # passes see the same float32
    "a clock": (adding(lambda self, z: time.perf_counter_ns() % 1_000_003), setting(), "clock"),
    "an unseeded generator": (
        adding(lambda self, z: np.random.default_rng().random()),
        setting(),
        "random numbers of its own",
    ),
    "a buffer that grows": (
        lambda self, z: (setattr(self, "kept", torch.cat([self.kept, z.detach()])), z)[1],
        buffering(kept=torch.zeros(0, WIDTH)),
        r"turns buffer kept from \[0, 5\] float32 into \[2, 5\] float32",
    ),
    "a new parameter": (late_parameter, setting(), "adds or removes scale"),
    "a parameter that is replaced": (
        lambda self, z: (
            setattr(self.head, "weight", nn.Parameter(self.head.weight.clamp(-1, 1))),
            z,
        )[1],
        setting(),
        "replaces parameter head.weight",
    ),
    "a parameter in a list": (
        lambda self, z: z @ self.own[0],
        owning,
        "attribute own holds parameter square a second time",
    ),
    "a hook that holds the model": (
        lambda self, z: z + self.kept["z"],
        hooked,
        "a copy of the model fails.*'z'.*make it a method",
    ),
    "gradient checkpointing": (
        lambda self, z: checkpoint(self.more, z, use_reentrant=False),
        lambda self: setattr(self, "more", nn.Linear(WIDTH, WIDTH)),
        "cannot run with weights that.*gradient checkpointing",
    ),
    "a parameter in a function": (
        lambda self, z: self.read(z),
        lambda self: vars(self).update(read=lambda z: z @ self.body.weight @ self.body.weight.T),
        "takes weights from elsewhere",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_passes_leave_to_one_another_is_refused_in_one_line(what):
    step, begin, text = REFUSED[what]
    with pytest.raises(ValueError, match=f"^name: [^\n]*({text})[^\n]*$"):
        made(step, begin)


# What is allowed


def cached(self, z):
    if self.mask is None or self.mask.shape != z.shape:
        self.mask = torch.ones_like(z).tril()
    return z * self.mask


def cached_by_shape(self, z):
    key = tuple(z.shape)
    if key not in self.masks:
        self.masks[key] = z.new_ones(z.shape[1:]).cumsum(0)
    return z * self.masks[key]


def recorded(self, z):
    self.last, self.size = z, len(z)
    if not torch._C._functorch.maybe_current_level():  # vmap knows no .item()
        self.norm = float(z.detach().sum())
    return z


def logged(self, z):
    self.seen.append(len(z))
    return z


def made_buffer(self, z):
    if self.table is None:
        self.table = torch.cos(torch.arange(z.shape[1]))
    return z * self.table


def positions(self, z):
    self.at = torch.arange(z.shape[1])
    return z * self.at


ALLOWED = {
    "a mask": (cached, setting(mask=None)),
    "masks by shape": (cached_by_shape, setting(masks={})),
    "what is only written": (recorded, setting()),
    "a list that is only written": (logged, setting(seen=[])),
    "an integer buffer made again": (positions, buffering(at=torch.zeros(0, dtype=torch.int64))),
    "a buffer that is None until a pass makes it": (
        made_buffer,
        lambda self: self.register_buffer("table", None, persistent=False),
    ),
    "a cache that was made before": (
        lambda self, z: z * self.scale,
        setting(scale=torch.arange(5.0)),
    ),
    "keyed noise": (
        lambda self, z: (
            F.dropout(z, 0.5, self.training)
            + (torch.empty(WIDTH).bernoulli_(0.5) if self.training else 0)
        ),
        setting(),
    ),
}


@pytest.mark.parametrize("what", ALLOWED)
@pytest.mark.parametrize("training", [False, True])
def test_caches_and_records_do_no_harm(what, training):
    step, begin = ALLOWED[what]
    model, module = made(step, begin), network(step, begin).train(training)
    function = model if training else model.eval_mode()
    clients = [
        {n: v + 0.1 * numbers(*v.shape, at=k) for n, v in model.initial.items()} for k in range(2)
    ]
    x = numbers(2, 4, *SHAPE)
    with torch.no_grad(), model.training_context(small_batch(x)):
        stacked = torch.func.vmap(function)(
            {n: torch.stack([c[n] for c in clients]) for n in clients[0]}, x
        )
    for tree, given, theirs in zip(clients, x, stacked, strict=True):
        with model.training_context(small_batch(x)):
            one = function(tree, given)
        torch.testing.assert_close(one, theirs)
        if not model.noisy:
            module.load_state_dict(tree, strict=False)
            torch.testing.assert_close(one, module(given))
    copy.deepcopy(model.modules)  # holds nothing of a pass


def small_batch(x):
    from fedlora_mpi.core.batch import Batch

    return Batch(
        x[0], torch.zeros(4, dtype=torch.int64), None, torch.tensor(7), torch.zeros(CLASSES)
    )


# Buffers


def assigned(self, z):
    if self.training:
        self.rm = 0.9 * self.rm + 0.1 * z.mean(0).detach()
    return z - self.rm


def in_place(self, z):
    if self.training:
        self.rm.mul_(0.9).add_(0.1 * z.mean(0).detach())
    return z - self.rm


def assigned_always(self, z):
    self.rm = 0.9 * self.rm + 0.1 * z.mean(0).detach()
    return z - self.rm


def in_place_always(self, z):
    self.rm.mul_(0.9).add_(0.1 * z.mean(0).detach())
    return z - self.rm


MEAN = buffering(rm=torch.zeros(WIDTH))


@pytest.mark.parametrize("step", [assigned, in_place, assigned_always, in_place_always])
def test_a_buffer_that_training_changes_is_kept_whether_in_place_or_not(step):
    model, module = made(step, MEAN), network(step, MEAN)
    tree = small.clone_tree(model.initial)
    assert model.role("rm") == "stats" and (model.effects == Effects()) is (step is in_place)
    for at in range(3):
        x = numbers(4, *SHAPE, at=at)
        torch.testing.assert_close(model(tree, x), module(x))
    torch.testing.assert_close(tree["rm"], module.rm)
    before, x = tree["rm"].clone(), numbers(4, *SHAPE)
    torch.testing.assert_close(model.eval_mode()(tree, x), module.eval()(x))
    assert torch.equal(tree["rm"], before)  # evaluation leaves no trace


@pytest.mark.parametrize("step", [assigned, assigned_always, in_place_always])
def test_such_buffers_are_each_clients_own_in_a_stack(step):
    model, x = made(step, MEAN), numbers(2, 4, *SHAPE)
    stack = {n: torch.stack([v, v + 0.1]) for n, v in model.initial.items()}
    alone = [{n: v[c].clone() for n, v in stack.items()} for c in range(2)]
    torch.func.vmap(model)(stack, x)
    for c in range(2):
        model(alone[c], x[c])
        torch.testing.assert_close(stack["rm"][c], alone[c]["rm"])
    shared = model.initial
    scores = torch.func.vmap(model.eval_mode(), in_dims=(None, 0))(shared, x)
    for c in range(2):
        torch.testing.assert_close(scores[c], model.eval_mode()(shared, x[c]))
    assert not shared["rm"].any()


def test_parts_of_such_a_network_work_alone():
    model, x = made(assigned_always, MEAN), numbers(4, *SHAPE)
    trees = [small.clone_tree(model.initial) for _ in range(2)]
    z = model.features({n: v for n, v in trees[0].items() if not n.startswith("head.")}, x)
    torch.testing.assert_close(model.classify(trees[0], z), model(trees[1], x))
    torch.testing.assert_close(trees[0]["rm"], trees[1]["rm"])


def test_an_input_that_is_written_to_stays_as_it_is():
    class Greedy(Net):
        def forward(self, x):
            return super().forward(F.relu(x.sub_(0.5), inplace=True))

    model, x = from_module(Greedy(), CLASSES, SHAPE), numbers(4, *SHAPE)
    before = x.clone()
    first = model(model.initial, x)
    assert torch.equal(x, before) and torch.equal(first, model(model.initial, x))


class Renormed(nn.Module):
    """An embedding whose rows are renormed as they are read."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(7, WIDTH, max_norm=0.5)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.rows(x).mean(1))


def test_evaluation_does_not_write_to_parameters():
    model = from_module(Renormed(), CLASSES, (4,), tokens=7)
    tree, x = small.clone_tree(model.initial), torch.tensor([[1, 2, 3, 3], [5, 0, 0, 0]])
    model.eval_mode()(tree, x)
    assert small.trees_equal(tree, model.initial)
    module = Renormed()
    module.load_state_dict(tree)
    torch.testing.assert_close(model(tree, x), module(x))
    assert torch.equal(tree["rows.weight"], module.rows.weight) and not small.trees_equal(
        tree, model.initial
    )
    other = small.clone_tree(model.initial)
    model(model.detach_tree(other), x)
    assert small.trees_equal(other, model.initial)


# The trial itself


def test_the_trial_leaves_the_module_and_the_generators_as_they_were():
    module = network(cached_by_shape, setting(masks={}))
    module.norm = nn.BatchNorm1d(3)
    kept, states = copy.deepcopy(module), global_states()
    from_module(module, CLASSES, SHAPE)
    assert small.trees_equal(
        module.state_dict(), {n: v for n, v in kept.state_dict().items() if "tracked" not in n}
    )
    assert module.masks == {} and global_states() == states


# Wrappers


def lazy(classes, shape):
    return nn.Sequential(
        nn.Flatten(), nn.LazyLinear(WIDTH), nn.LazyBatchNorm1d(), nn.LazyLinear(classes)
    )


def late(classes, shape):
    class Late(nn.Module):
        def forward(self, x):
            if not hasattr(self, "head"):
                self.head = nn.Linear(x[0].numel(), classes)
            return self.head(x.flatten(1))

    return Late()


def plain(classes, shape):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(6, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, classes)
    )


def data_parallel(module):
    """``module`` for all GPUs, of which there are none,
    whatever device other tests have made up."""
    with patch("torch.nn.parallel.data_parallel._get_available_device_type", lambda: None):
        return nn.DataParallel(module)


def parallel(classes, shape):
    return data_parallel(plain(classes, shape))


def parallel_inside(classes, shape):
    module = plain(classes, shape)
    module[1] = data_parallel(module[1])
    return module


def compiled(classes, shape):
    return torch.compile(plain(classes, shape))


def compiled_inside(classes, shape):
    module = plain(classes, shape)
    module[1] = torch.compile(module[1])
    module[2].compile()
    module.compile()
    return module


@pytest.mark.parametrize("wrapped", [parallel, parallel_inside, compiled, compiled_inside])
def test_wrappers_of_one_machine_are_taken_off(wrapped):
    one, other = (
        build(f"test_purity:{f.__name__}", {}, CLASSES, SHAPE, 1) for f in (plain, wrapped)
    )
    assert (
        small.trees_equal(one.initial, other.initial)
        and one.leaves == other.leaves
        and one.flops == other.flops
    )
    x = numbers(4, *SHAPE)
    assert torch.equal(
        one(small.clone_tree(one.initial), x), other(small.clone_tree(other.initial), x)
    )


@pytest.mark.parametrize("builder, leaves", [(lazy, 8), (late, 2)])
def test_layers_that_the_first_pass_makes_are_leaves(builder, leaves):
    one, two = (build(f"test_purity:{builder.__name__}", {}, CLASSES, SHAPE, 1) for _ in range(2))
    assert len(one.initial) == leaves and small.trees_equal(one.initial, two.initial)
    assert one(small.clone_tree(one.initial), numbers(4, *SHAPE)).shape == (4, CLASSES)


def scripted(classes, shape):
    return torch.jit.script(plain(classes, shape))


def scripted_inside(classes, shape):
    module = plain(classes, shape)
    module[1] = torch.jit.script(module[1])
    return module


def traced(classes, shape):
    return torch.jit.trace(plain(classes, shape), torch.zeros(2, *shape))


def on_meta(classes, shape):
    return plain(classes, shape).to("meta")


def locked(classes, shape):
    import threading

    module = plain(classes, shape)
    module[1].lock = threading.Lock()
    return module


def exported(classes, shape):
    return torch.export.export(plain(classes, shape), (torch.zeros(2, *shape),)).module()


@pytest.mark.parametrize(
    "builder, text",
    [
        (scripted, "the model is a scripted or traced module"),
        (scripted_inside, "layer 1 is a scripted"),
        (traced, "traced module"),
        (on_meta, "1.weight is on device meta"),
        (locked, "1.lock cannot be copied"),
        (exported, "train"),
    ],
)
def test_modules_that_cannot_be_functions_are_refused(builder, text):
    with pytest.raises(ValueError, match=f"^name: [^\n]*{text}[^\n]*$"):
        build(f"test_purity:{builder.__name__}", {}, CLASSES, SHAPE, 1)


ERRORS = (
    RuntimeError,
    KeyError,
    IndexError,
    TypeError,
    NotImplementedError,
    OSError,
    ZeroDivisionError,
)


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_forward_pass_raises_is_one_line(error):
    def step(self, z):
        raise error("two\nlines")

    with pytest.raises(
        ValueError, match="^name: the model refuses inputs of shape [^\n]*lines[^\n]*$"
    ):
        made(step)
