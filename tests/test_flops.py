"""FLOPs of networks that torch's own counter cannot count, and what happens where nobody can."""

import pytest
import small
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.cli import main
from fedlora_mpi.engine.flops import UNCOUNTED, Flops
from fedlora_mpi.engine.memory import stack_capacity
from fedlora_mpi.models.counting import FlopCounter
from fedlora_mpi.models.zoo import build
from fedlora_mpi.store.reader import RunFiles

TINY = """
seed: 1
rounds: 2
output: run
data:
  dataset: synthetic
  synthetic: {classes: 4, train: 80, test: 40, noise: 1.0}
  partition: {kind: dirichlet_class, alpha: 0.7, clients: 4, minimum: 5}
train: {epochs: 1, batch_size: 8, lr: 0.05, momentum: 0.9}
"""
HOW = {
    "as_input": lambda layer: layer,
    "weight": parametrizations.weight_norm,
    "spectral": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old_weight": nn.utils.weight_norm,
    "old_spectral": nn.utils.spectral_norm,
}


class Latent(nn.Module):
    """A network in which a parameter is the input of a layer; ``how`` parametrizes the others."""

    def __init__(self, classes, shape, *, how="as_input"):
        super().__init__()
        self.body = HOW[how](nn.Linear(shape[0] * shape[1] * shape[2], 5))
        self.latents, self.norm, self.mix = (
            nn.Parameter(torch.randn(2, 5)),
            nn.LayerNorm(5),
            nn.Linear(5, 5),
        )
        self.head = HOW[how](nn.Linear(5, classes))

    def forward(self, x):
        z = self.body(x.flatten(1)).unsqueeze(1) + self.mix(self.norm(self.latents))  # [B, 2, 5]
        return self.head(z.tanh().mean(1))


@pytest.mark.parametrize("how", HOW)
def test_a_forward_pass_is_counted_where_a_parameter_is_a_layers_input(how):
    flops = build("test_flops:Latent", {"how": how}, 4, (3, 2, 2), 1).flops
    # of the layers; those of ``mix`` serve two samples
    least = 2 * (12 * 5 + 5 * 4) + 2 * 2 * 5 * 5 // 2
    # torch's counter leaves out products with a vector, of which spectral norms are made
    more = how == "orthogonal"
    assert least < flops < 40 * least if more else flops == least


# what goes through the whole run in make test
FEW = (("as_input", "loop"), ("spectral", "stack"), ("old_weight", "stack"))


@pytest.mark.parametrize(
    "how, path",
    [
        pytest.param(h, p, marks=() if (h, p) in FEW else pytest.mark.thorough)
        for p in ("loop", "stack")
        for h in HOW
    ],
)
def test_such_networks_run_and_are_planned(how, path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(TINY)
    over = [
        "model=test_flops:Latent",
        f"model.how={how}",
        f"engine.path={path}",
        "algorithm=fedavg",
    ]
    assert main(["run", "c.yaml", *over]) == 0
    rounds = RunFiles(tmp_path / "run").rounds()
    assert (rounds["flops"] > 0).all() and rounds["train_loss"][1] < rounds["train_loss"][0]
    assert main(["plan", "c.yaml", *over]) == 0
    assert "cannot be counted" not in capsys.readouterr().err


@pytest.mark.parametrize("how", HOW)
def test_such_networks_train_alike_one_by_one_and_in_a_stack(how):
    model = build("test_flops:Latent", {"how": how}, 4, (3, 2, 2), 1)
    x = torch.randn(2, 6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    leaves = {n: torch.stack([v, 1.1 * v]) for n, v in model.initial.items()}

    def loss(tree, x):
        return model(tree, x).square().sum()

    trained = [n for n in leaves if model.role(n) != "stats"]
    stats = {n: v for n, v in leaves.items() if n not in trained}
    alone = [{n: v[c].clone() for n, v in leaves.items()} for c in range(2)]
    given = {n: leaves[n].requires_grad_() for n in trained}
    grads = torch.autograd.grad(torch.func.vmap(loss)(given | stats, x).sum(), given.values())
    for c in range(2):
        each = {n: alone[c][n].requires_grad_() for n in trained}
        mine = torch.autograd.grad(loss(alone[c] | each, x[c]), each.values())
        for one, stacked in zip(mine, grads, strict=True):
            torch.testing.assert_close(one, stacked[c], rtol=1e-4, atol=1e-5)
        for name, value in stats.items():
            torch.testing.assert_close(alone[c][name], value[c])
    assert stack_capacity(model, 8, 10**9) > 1


def test_parametrized_layers_keep_their_role_and_are_no_matrices():
    for how in ("weight", "spectral", "orthogonal", "old_weight", "old_spectral"):
        leaves = build("test_flops:Latent", {"how": how}, 4, (3, 2, 2), 1).leaves
        of_head = {n: leaf for n, leaf in leaves.items() if n.startswith("head.")}
        assert {leaf.role for leaf in of_head.values()} <= {"head", "stats"} and len(of_head) > 1
        assert {n for n, leaf in leaves.items() if leaf.matrix} == {"mix.weight"}


@pytest.mark.parametrize("network", ["cnn", "bn_net", "noisy_net", "conv_net"])
def test_counts_are_torchs_own_where_it_has_them(network):
    model = small.make_model(network)
    tree = {n: v.clone().requires_grad_(model.role(n) != "stats") for n, v in model.initial.items()}
    totals = []
    for counter in (FlopCounter(), FlopCounterMode(display=False)):
        with counter:
            model.eval_mode()(tree, model.zero_inputs(3)).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


class Pairs(nn.Module):
    """Takes samples two by two."""

    def __init__(self, classes, shape):
        super().__init__()
        self.head = nn.Linear(105, classes)

    def forward(self, x):
        z = x.flatten(1).view(-1, 2, 105)
        return self.head((z - 0 * z.mean(1, keepdim=True)).view(-1, 105))


def pairs(classes, shape):
    return Pairs(classes, shape)


def test_a_step_that_cannot_be_counted_ends_nothing(capsys):
    made = small.make_trainer(FedAvg(), "test_flops:pairs")
    flops = Flops(made, small.initial_variables(made))
    assert flops.round_flops(7, 0) == UNCOUNTED == flops.round_flops(7, 1)
    said = capsys.readouterr().err
    assert said.startswith("hint: FLOPs cannot be counted (shape") and said.count("\n") == 1
    # batches of 5 and 3
    assert Flops(made, small.initial_variables(made)).round_flops(8, 0) == UNCOUNTED
