"""Prompts of a frozen network, and ``fedhpl_like``, whose clients learn from others' logits."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch
import torch.nn.functional as F
from runs import TINY, assert_same_run, run_rounds, snapshots_equal, tiny_config
from tiers import STACK_FIRST, thorough_param
from torch import nn

from fedlora_mpi.algorithm import Batch, Variables
from fedlora_mpi.algorithms.fedhpl_like import FedHPLLike
from fedlora_mpi.components.outputs import correct_outputs
from fedlora_mpi.components.prompts import PromptTuning
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.vision import import_torchvision
from fedlora_mpi.experiment.loop import resume, start
from fedlora_mpi.models import zoo
from fedlora_mpi.models.network import from_module
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.store.reader import RunFiles

OUTPUTS, HOLDERS = ".class.outputs", ".class.holders"
OWN, CORRECT, ROUND, PROMPTS = ".own.outputs", ".own.correct", ".own.round", ".prompts."
HERE = Path(__file__).stem
VIT = f"{HERE}:small_vit"
TINY_VIT = "model={name: vit, patch: 4, width: 8, heads: 2, layers: 1, feedforward: 12}"
PROMPTED = ("algorithm={name: fedhpl_like, prompts: 2}", TINY_VIT, "rounds=3")
TUNED = {"head.weight", "head.bias", PROMPTS}


def small_vit(classes, shape):
    """The zoo's vit on the images of ``small``, with a token a pixel."""
    return zoo.vit(classes, shape, patch=1, width=6, heads=2, layers=2, feedforward=8)


def narrow_vit(classes, shape):
    """Another one."""
    return zoo.vit(classes, shape, patch=1, width=4, heads=1, layers=1, feedforward=5)


def numbers(*shape, at=0):
    return torch.randn(*shape, generator=rng(1, "fedhpl", *shape, at))


def tuned(model, prompts=3):
    """The variables of a client, moved from the start."""
    v = PromptTuning(prompts).init(model, rng(1, "init"))
    return v._replace(personal={n: w + 0.3 * numbers(*w.shape) for n, w in v.personal.items()})


# Prompts


def test_the_input_of_a_module_can_be_replaced():
    model, x = small.make_model(VIT).eval_mode(), numbers(4, *small.SHAPE)
    plain = model(model.initial, x)
    same = model.replace_input(model.initial, x, "blocks.1", lambda z: z)
    assert torch.equal(same, plain)
    other = model.replace_input(model.initial, x, "blocks.1", lambda z: 0 * z)
    assert not torch.allclose(other, plain)
    torch.testing.assert_close(other[0], other[1])  # rows of a batch may differ in last bits
    assert torch.equal(model(model.initial, x), plain)  # nothing stays replaced


def test_prompts_stand_between_the_class_token_and_the_patches_without_positions():
    model, x = small.make_model(VIT).eval_mode(), numbers(4, *small.SHAPE)
    v = tuned(model)
    module = model.to_module(model.initial | {n: v.personal[n] for n in TUNED - {PROMPTS}})
    z = module.embedding(x)
    z = torch.cat([z[:, :1], v.personal[PROMPTS].expand(4, 3, 6), z[:, 1:]], 1)
    for block in module.blocks:
        z = block(z)
    expected = module.head(module.norm(z[:, 0]))
    torch.testing.assert_close(PromptTuning(3).logits(model, v, x), expected)
    assert not torch.allclose(expected, module(x), atol=1e-3)


def test_prompts_fit_the_vision_transformers_of_torchvision():
    network = import_torchvision().models.VisionTransformer(8, 4, 1, 2, 12, 20, num_classes=4)
    model, algorithm = from_module(network, 4, (3, 8, 8)).eval_mode(), PromptTuning(2)
    v, x = tuned(model, 2), numbers(5, 3, 8, 8)
    algorithm.check(model, small.TRAIN)
    assert algorithm.first_block(model) == ("encoder.layers.encoder_layer_0", 12)
    module = model.to_module(model.initial | {n: w for n, w in v.personal.items() if n != PROMPTS})

    def add_prompts(layer, inputs):
        z = inputs[0]
        return (torch.cat([z[:, :1], v.personal[PROMPTS].expand(5, 2, 12), z[:, 1:]], 1),)

    module.encoder.layers[0].register_forward_pre_hook(add_prompts)
    torch.testing.assert_close(algorithm.logits(model, v, x), module(x))


class Reshaping(nn.Module):
    """A network that makes an image of its tokens, so that there must be as many as pixels."""

    def __init__(self):
        super().__init__()
        self.block = zoo.vit(4, (3, 2, 2), patch=1, width=4, heads=1, layers=1).blocks[0]
        self.patches, self.head = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x):
        z = self.block(self.patches(x.flatten(2).transpose(1, 2)))
        return self.head(z.view(len(x), 2, 2, 4)[:, 0, 0])


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: small.make_model("cnn"), "needs a network that makes tokens of images, in blocks"),
        (
            lambda: zoo.build("transformer", {}, 3, (8,), 1, 9),
            "needs a network that makes tokens of images, in blocks",
        ),
        (
            lambda: from_module(Reshaping(), 4, (3, 2, 2)),
            r"the network takes no further tokens \(.*\); set model.name = vit, or prompts = 0$",
        ),
    ],
    ids=["cnn", "texts", "reshaped"],
)
def test_a_network_without_tokens_is_refused(model, message):
    with pytest.raises(ValueError, match=f"^prompts = 10: {message}") as refused:
        FedHPLLike().check(model(), small.TRAIN)
    assert "\n" not in str(refused.value)


def test_a_run_without_tokens_ends_before_it_begins(call, tmp_path):
    code, out, err = call("run", TINY, "algorithm=fedhpl_like", "output=run")
    assert code == 2 and "tiny.yaml: algorithm.prompts = 10: needs a network" in err
    assert len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_without_prompts_the_head_of_any_network_is_trained():
    for network in ("cnn", "bn_net", VIT):
        model = small.make_model(network)
        personal = PromptTuning(0).init(model, rng(1, "init")).personal
        assert {*personal} == {n for n in model.leaves if model.role(n) == "head"}
        PromptTuning(0).check(model, small.TRAIN)


def test_settings_out_of_range_are_refused():
    for key, value in (("prompts", -1), ("gamma", -1.0), ("temperature", 0.0)):
        with pytest.raises(ValueError, match=f"^{key} = {value}: must be"):
            FedHPLLike(**{key: value})


# What trains, and what stays


def digest(tree):
    total = hashlib.sha256()
    for name in sorted(tree):
        total.update(name.encode() + tree[name].numpy().tobytes())
    return total.hexdigest()


@STACK_FIRST
@pytest.mark.parametrize("network", [VIT, "bn_net"])
def test_the_frozen_network_keeps_its_bits_and_no_client_has_it(stacked, network):
    algorithm = FedHPLLike(prompts=2 if network == VIT else 0)
    federation, state = small.make_experiment(algorithm, network, stacked=stacked)
    model = federation.clients.trainer.model
    before, personal = digest(model.all_values), small.clone_tree(state.personal)
    state = small.run_rounds(federation, state, 2)
    assert digest(model.all_values) == before
    head = {n for n in model.leaves if model.role(n) == "head"}
    network_leaves = head | ({PROMPTS} if network == VIT else set())
    assert {*state.personal} == network_leaves | {OWN, CORRECT, ROUND}
    assert all(not torch.equal(state.personal[n], personal[n]) for n in network_leaves)


def test_the_client_s_model_has_the_frozen_leaves_and_its_head():
    model = small.make_model("bn_net")
    v = tuned(model, 0)
    leaves = FedHPLLike(prompts=0).client_model(model, v)
    assert small.trees_equal(leaves, model.initial | v.personal)
    with pytest.raises(
        ValueError, match="^prompts = 3: no weights of the network are the client's"
    ):
        FedHPLLike(prompts=3).client_model(small.make_model(VIT), tuned(small.make_model(VIT)))


@STACK_FIRST
@pytest.mark.parametrize("network, prompts", [(VIT, 3), ("noisy_net", 0)])
def test_without_distillation_it_is_local_training_to_the_bit(stacked, network, prompts):
    how = {"network": network, "stacked": stacked, "participation": 0.6, "rounds": 3}
    ours = small.final_state(FedHPLLike(prompts=prompts, gamma=0.0), **how).personal
    alone = small.final_state(PromptTuning(prompts), **how).personal
    assert small.trees_equal({n: ours[n] for n in alone}, alone)
    coupled = small.final_state(FedHPLLike(prompts=prompts), **how).personal
    assert not torch.equal(coupled["head.bias" if prompts else "5.bias"], alone[[*alone][-2]])


# The loss


def teaching(*m, round_=1, classes=4):
    """A client's leaves: m_i, its own sums of round 1, and the sums over all clients.

    The others have 2 correct samples of class 0 and 3 of class 1.
    """
    m, others = torch.tensor(m, dtype=torch.float64), torch.tensor([2.0, 3.0, 0.0, 0.0]).double()
    L, L_others = (numbers(classes, classes, at=at).double() for at in (1, 2))
    shared = {OUTPUTS: m[:, None] * L + others[:, None] * L_others, HOLDERS: m + others}
    own = {OWN: m[:, None] * L, CORRECT: m, ROUND: torch.ones(1)}
    return Variables(shared, own), L, L_others


def test_teachers_are_the_others_or_else_the_client_s_own_last_table():
    v, L, L_others = teaching(5.0, 0.0, 4.0, 0.0)
    G, holders = FedHPLLike().teacher_logits(v, 1)
    assert holders.tolist() == [2, 3, 4, 0]
    torch.testing.assert_close(G[:2], L_others[:2])
    torch.testing.assert_close(G[2], L[2])
    # it was away in the last round, so the sums are those of others alone
    G, holders = FedHPLLike().teacher_logits(v, 2)
    assert holders.tolist() == [7, 3, 4, 0]
    torch.testing.assert_close(G[0], (5 * L[0] + 2 * L_others[0]) / 7)


def linear_loss(algorithm, v, x, y, weight, round_=1, real=None):
    """The loss of a client whose network is one Linear without bias."""
    network = nn.Linear(3, 4, bias=False)
    model = from_module(network, 4, (3,))
    step = algorithm.local(model, small.TRAIN, round_)[0].steps[0]
    batch = Batch(x, y, real, torch.tensor(0), torch.ones(4))
    assert step.trains("weight")
    now = v._replace(personal=v.personal | {"weight": weight})
    return step.loss(now, v, batch)


def test_the_loss_is_the_formula():
    algorithm = FedHPLLike(prompts=0, gamma=0.7, temperature=3.0)
    v, L, L_others = teaching(5.0, 0.0, 4.0, 0.0)
    x, y, weight = numbers(5, 3).double(), torch.tensor([0, 1, 2, 3, 1]), numbers(4, 3).double()
    z = x @ weight.T
    G = torch.stack([L_others[0], L_others[1], L[2], z[3]])[y]  # class 3 is nobody's
    each = F.kl_div((z / 3).log_softmax(1), (G / 3).softmax(1), reduction="none").sum(1)
    each[3] = 0
    expected = F.cross_entropy(z, y) + 0.7 * 9 * each.mean()
    torch.testing.assert_close(linear_loss(algorithm, v, x, y, weight), expected)
    real = torch.tensor([True, True, True, True, False])
    padded = linear_loss(algorithm, v, x, y, weight, real=real)
    torch.testing.assert_close(padded, linear_loss(algorithm, v, x[:4], y[:4], weight))


def test_a_class_that_nobody_has_and_a_first_round_add_nothing():
    v, *_ = teaching(5.0, 0.0, 4.0, 0.0)
    x, weight = numbers(5, 3).double(), numbers(4, 3).double()
    for y, round_ in ((torch.full((5,), 3), 1), (torch.arange(5) % 4, 0)):
        losses = [
            linear_loss(FedHPLLike(prompts=0, gamma=gamma), v, x, y, weight, round_)
            for gamma in (0.0, 5.0)
        ]
        assert losses[0] == losses[1]


def test_the_gradient_of_the_loss_is_that_of_finite_differences():
    v, *_ = teaching(5.0, 0.0, 4.0, 0.0)
    x, y = numbers(5, 3).double(), torch.tensor([0, 1, 2, 3, 1])
    weight = numbers(4, 3).double().requires_grad_()
    for gamma in (0.0, 0.7):
        algorithm = FedHPLLike(prompts=0, gamma=gamma, temperature=3.0)
        torch.autograd.gradcheck(lambda w, a=algorithm: linear_loss(a, v, x, y, w), weight)
    grads = [
        torch.autograd.grad(linear_loss(FedHPLLike(prompts=0, gamma=g), v, x, y, weight), weight)[0]
        for g in (0.0, 0.7)
    ]
    assert not torch.allclose(*grads)


def test_the_gradient_reaches_prompts_and_head():
    model = small.make_model(VIT)
    algorithm = FedHPLLike(prompts=3)
    v = algorithm.init(model, rng(1, "init"))
    table = numbers(small.CLASSES, small.CLASSES)
    v = v._replace(shared={OUTPUTS: table, HOLDERS: torch.ones(small.CLASSES)})
    step = algorithm.local(model, small.TRAIN, 1)[0].steps[0]
    names = [n for n in v.personal if step.trains(n)]
    assert {*names} == TUNED and not any(step.trains(n) for n in v.shared)
    assert not any(step.trains(n) for n in model.leaves if model.role(n) != "head")
    leaves = {n: w.clone().requires_grad_(n in TUNED) for n, w in v.personal.items()}
    batch = Batch(numbers(4, *small.SHAPE), torch.arange(4), None, torch.tensor(0), torch.ones(6))
    loss = step.loss(v._replace(personal=leaves), v, batch)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss, [leaves[n] for n in TUNED]))


# The exchange


def test_a_table_has_the_correctly_classified_samples_alone():
    z = torch.tensor([[3.0, 1.0], [0.0, 2.0], [5.0, 4.0], [9.0, 0.0], [1.0, 2.0]])
    y, real = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([True, True, True, False, True])
    data = Batch(z, y, real, torch.tensor(0), torch.tensor([3.0, 1.0]))
    sums, m = correct_outputs(lambda x: x, data)
    assert m.tolist() == [2, 1] and sums.tolist() == [[8, 5], [1, 2]]


def table(federation, state, client):
    """L_i [classes, classes] of correctly classified samples, and their numbers, by the formula."""
    own_type, row = federation.clients[client], federation.placement.row_of_client[client]
    model, data = (
        own_type.trainer.model.eval_mode(),
        own_type.trainer.feed.unshuffled_batch([client], all_samples=True),
    )
    own = {n: state.personal[own_type.prefix + n][row] for n in own_type.initial.personal}
    x, y = data.x[0], data.y[0]
    z = own_type.algorithm.logits(model, Variables({}, own), x)
    is_right = z.argmax(1) == y
    rows = [z[is_right & (y == c)].double() for c in range(small.CLASSES)]
    m = torch.tensor([len(r) for r in rows])
    return torch.stack([r.sum(0) for r in rows]) / m.clamp(min=1)[:, None], m, own


@STACK_FIRST
@pytest.mark.parametrize(
    "network", [VIT, thorough_param("bn_net"), thorough_param((VIT, f"{HERE}:narrow_vit"))], ids=str
)
def test_a_client_learns_from_the_mean_logits_of_the_others_weighted_by_samples(stacked, network):
    algorithm = FedHPLLike(prompts=0 if network == "bn_net" else 3)
    how = {"participation": 0.6, "stacked": stacked, "train": replace(small.TRAIN, epochs=5)}
    federation, state = small.make_experiment(algorithm, network, **how)
    came_back = compared = 0
    for round_ in range(1, 5):
        cohort = federation.cohorts.sample(state.round).members
        state = small.run_rounds(federation, state, 1)
        tables = {client: table(federation, state, client) for client in range(5)}
        for client, (L, m, own) in tables.items():
            others = [j for j in cohort if j != client]
            came_back += client not in cohort and bool(own[ROUND])
            total = sum(tables[j][1] for j in others)
            means = sum(tables[j][1][:, None] * tables[j][0] for j in others)
            means = means / total.clamp(min=1)[:, None]
            if not own[ROUND]:
                m = 0 * m  # it has no table yet
            G, holders = algorithm.teacher_logits(Variables(state.shared, own), round_)
            assert torch.equal(holders, torch.where(total > 0, total, m).to(holders))
            expected = torch.where(total[:, None] > 0, means, L)[holders > 0]
            torch.testing.assert_close(G[holders > 0].double(), expected, rtol=1e-4, atol=1e-4)
            compared += len(expected)
    assert came_back and compared > 10


def test_identical_clients_learn_from_their_own_table():
    how = {"sizes": (7, 7, 7), "same_sample": True, "rounds": 2}
    state = small.final_state(FedHPLLike(prompts=3), VIT, **how)
    v = Variables(state.shared, {n: w[0] for n, w in state.personal.items()})
    G, holders = FedHPLLike().teacher_logits(v, 2)
    assert holders.sum() == 14  # of the one class
    has = holders > 0
    own = v.personal[OWN] / v.personal[CORRECT].clamp(min=1)[:, None]
    torch.testing.assert_close(G[has], own[has], rtol=1e-6, atol=1e-6)


def test_a_message_has_a_table_and_its_counts():
    for prompts, model in ((0, small.make_model("cnn")), (3, small.make_model(VIT))):
        algorithm = FedHPLLike(prompts=prompts)
        v = algorithm.init(model, rng(1, "init"))
        upload = algorithm.upload(v, v, 0)
        C = small.CLASSES
        assert sum(w.numel() for w in upload.message.values()) == C * C + C
        assert upload.numel is None and not upload.mix and not upload.mean
    row = run_rounds("algorithm={name: fedhpl_like, prompts: 2}", TINY_VIT, "rounds=1")[0][-1].row
    assert row["bytes_up"] == row["bytes_down"] == row["clients"] * 4 * (4 * 4 + 4)


@pytest.mark.parametrize("ranks", [2, 3, thorough_param(4)])
def test_the_ranks_move_no_bit(ranks):
    alone, moments = run_rounds(*PROMPTED)[0], run_rounds(*PROMPTED, ranks=ranks)[0]
    assert all(snapshots_equal(a, b) for a, b in zip(alone, moments, strict=True))


def test_a_stack_equals_the_loop():
    stack, loop = (
        run_rounds(*PROMPTED, f"engine.path={path}")[0][-1] for path in ("stack", "loop")
    )
    for leaf, rows in (stack.shared | stack.personal).items():
        other = (loop.shared | loop.personal)[leaf]
        torch.testing.assert_close(rows, other, rtol=1e-4, atol=1e-4, msg=leaf)


def test_a_resume_moves_no_bit(tmp_path):
    folders = [tmp_path / name for name in ("whole", "cut")]
    for folder, rounds in zip(folders, (3, 2), strict=True):
        config = tiny_config(
            *PROMPTED, f"rounds={rounds}", f"output={folder}", "checkpoint.every=1"
        )
        assert start(config, str(TINY), Solo()) == 0
    assert resume(folders[1], ["rounds=3"], Solo()) == 0
    assert_same_run(*folders)


def test_clients_may_have_different_transformers():
    networks = "model={mix: [{name: vit, patch: 4, width: 8, heads: 2, layers: 1}, {name: vit, patch: 2, width: 4, heads: 1, layers: 2}]}"
    moments = run_rounds("algorithm={name: fedhpl_like, prompts: 2}", networks, "rounds=2")[0]
    prompts = {n: v.shape[1:] for n, v in moments[-1].personal.items() if n.endswith(PROMPTS)}
    assert sorted(prompts.values()) == [(2, 4), (2, 8)]
    assert (moments[-1].shared[HOLDERS] > 0).any()


def test_the_frozen_blocks_come_from_a_pretrained_file(call, tmp_path):
    assert call("pretrain", TINY, TINY_VIT, "--epochs", 2, "--to", "net.safetensors")[0] == 0
    accuracies = {}
    for name, given in (("warm", ("model.weights=net.safetensors",)), ("cold", ())):
        model = (TINY_VIT, *given, "rounds=1", f"output={name}")
        code, _, err = call("run", TINY, "algorithm={name: fedhpl_like, prompts: 2}", *model)
        assert code == 0, err
        accuracies[name] = RunFiles(tmp_path / name).rounds()["accuracy"][0]
    assert accuracies["warm"] > accuracies["cold"] + 0.1
