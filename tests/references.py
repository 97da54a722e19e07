"""Rounds of methods in plain PyTorch, from the equations of their papers; for ``test_parity.py``.

Nothing of the package is imported. A client's model is an nn.Module, and SGD is torch.optim.SGD. A
method is a generator: after each round it yields the leaves of the server, and those of each client
by its number, under the names that the package gives them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Tree = dict[str, Tensor]
Batches = list[tuple[Tensor, Tensor]]
Factors = dict[str, tuple[Tensor, Tensor]]  # {weight: (A, B)}
Rounds = Iterator[tuple[Tree, list[Tree]]]


class Network(nn.Module):
    """A convolution, BatchNorm, a Linear and a head, all in float64."""

    def __init__(self, classes: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(shape[0], 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4 * -(-shape[1] // 2) * -(-shape[2] // 2), 7)
        self.head = nn.Linear(7, classes)
        self.double()

    def features(self, x: Tensor) -> Tensor:
        return self.hidden(self.norm(self.conv(x.double())).tanh().flatten(1)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@dataclass(frozen=True)
class Federation:
    """What all methods have in common: clients, their data, and local SGD.

    batches: the mini-batches of (client, round, epoch). samples: all samples of a client. factors:
    the factors, with B = 0, that a round starts from.
    """

    network: Network  # before round 1
    cohorts: Sequence[Sequence[int]]  # the clients of each round
    batches: Callable[[int, int, int | str], Batches]
    samples: Sequence[tuple[Tensor, Tensor]]
    factors: Callable[[int], Factors]
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float

    @property
    def clients(self) -> range:
        return range(len(self.samples))

    def size(self, client: int) -> int:
        return len(self.samples[client][1])

    def weights(self, cohort: Sequence[int]) -> list[float]:
        """n_k / n of the clients of a cohort."""
        return [self.size(k) / sum(map(self.size, cohort)) for k in cohort]

    def class_counts(self, client: int) -> Tensor:
        return torch.bincount(self.samples[client][1], minlength=self.network.head.out_features)

    def epoch_batches(
        self, client: int, round_: int, first: int = 0, end: int | None = None
    ) -> Batches:
        """All batches of the epochs from ``first`` up to, but without, ``end``."""
        epochs = range(first, self.epochs if end is None else end)
        return [batch for epoch in epochs for batch in self.batches(client, round_, epoch)]

    def sgd(self, leaves: Iterable[Tensor]) -> torch.optim.SGD:
        """SGD on these leaves, which begins without momentum."""
        return torch.optim.SGD(
            list(leaves), self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )


def step(sgd: torch.optim.SGD, loss: Tensor) -> None:
    """A step on the leaves of ``sgd`` alone; others that the loss reads get no gradient."""
    leaves = sgd.param_groups[0]["params"]
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        leaf.grad = gradient
    sgd.step()


def fit(model: nn.Module, sgd: torch.optim.SGD, batches: Batches) -> None:
    """One step by the cross-entropy of a model on each batch."""
    for x, y in batches:
        step(sgd, F.cross_entropy(model(x), y))


def leaves_of(model: nn.Module, *parts: str) -> Tree:
    """Copies of a model's parameters and running statistics, of all or of these parts."""
    return {
        n: v.clone()
        for n, v in model.state_dict().items()
        if v.is_floating_point() and (not parts or n.startswith(parts))
    }


def parameters_of(model: nn.Module) -> Tree:
    """Copies of a model's parameters, without running statistics."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def copy_with(model: Network, tree: Tree) -> Network:
    """A copy of a model with other values of some leaves."""
    model = deepcopy(model)
    model.load_state_dict(tree, strict=False)
    return model


def average(trees: Sequence[Tree], weights: Sequence[float] | None = None) -> Tree:
    """The weighted mean of trees; without weights the plain mean."""
    weights = weights or [1 / len(trees)] * len(trees)
    return {n: sum(p * t[n] for p, t in zip(weights, trees, strict=True)) for n in trees[0]}


def average_models(models: Sequence[Network], weights: Sequence[float] | None = None) -> Network:
    """The weighted mean of models with that of their running statistics."""
    return copy_with(models[0], average([leaves_of(model) for model in models], weights))


def squared_distance(a: nn.Module, b: nn.Module) -> Tensor:
    """||a - b||^2 of the parameters; b is constant."""
    return sum(
        ((p - q.detach()) ** 2).sum() for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def named(prefix: str, tree: Tree) -> Tree:
    return {prefix + n: v for n, v in tree.items()}


# One model for all clients


def fedavg(f: Federation) -> Rounds:
    """McMahan et al., Algorithm 1: w <- sum_k n_k / n w_k."""
    w = f.network
    for t, cohort in enumerate(f.cohorts):
        trained = []
        for k in cohort:
            w_k = deepcopy(w)
            fit(w_k, f.sgd(w_k.parameters()), f.epoch_batches(k, t))
            trained.append(w_k)
        w = average_models(trained, f.weights(cohort))
        yield leaves_of(w), [{} for _ in f.clients]


def fedprox(f: Federation, mu: float) -> Rounds:
    """Li et al., eq. (2): h_k(w_k; w) = F_k(w_k) + mu / 2 ||w_k - w||^2."""
    w = f.network
    for t, cohort in enumerate(f.cohorts):
        trained = []
        for k in cohort:
            w_k = deepcopy(w)
            sgd = f.sgd(w_k.parameters())
            for x, y in f.epoch_batches(k, t):
                step(sgd, F.cross_entropy(w_k(x), y) + mu / 2 * squared_distance(w_k, w))
            trained.append(w_k)
        w = average_models(trained, f.weights(cohort))
        yield leaves_of(w), [{} for _ in f.clients]


def fedlc(f: Federation, tau: float) -> Rounds:
    """Zhang et al. with all classes in the sum: cross-entropy of z - tau n_c^(-1/4)."""
    w = f.network
    for t, cohort in enumerate(f.cohorts):
        trained = []
        for i in cohort:
            w_i, shift = deepcopy(w), tau * f.class_counts(i).double() ** -0.25
            sgd = f.sgd(w_i.parameters())
            for x, y in f.epoch_batches(i, t):
                step(sgd, F.cross_entropy(w_i(x) - shift, y))  # -inf for a class without samples
            trained.append(w_i)
        w = average_models(trained, f.weights(cohort))
        yield leaves_of(w), [{} for _ in f.clients]


def fedga(f: Federation) -> Rounds:
    """The authors' code: soft labels t_k = q_k (n_y - n_k) / n_y with n of the batch, t_y = 1."""
    w = f.network
    for t, cohort in enumerate(f.cohorts):
        trained = []
        for i in cohort:
            w_i = deepcopy(w)
            sgd = f.sgd(w_i.parameters())
            for x, y in f.epoch_batches(i, t):
                z, labels = w_i(x), F.one_hot(y, w.head.out_features).double()
                n = labels.sum(0)
                targets = z.detach().softmax(1) * (n[y][:, None] - n) / n[y][:, None] + labels
                step(sgd, F.cross_entropy(z, targets))
            trained.append(w_i)
        w = average_models(trained)
        yield leaves_of(w), [{} for _ in f.clients]


def fedbc(f: Federation, lam: float, gamma: float, alpha: float) -> Rounds:
    """Bedi et al. with learned radii: f_i(w_i) + lam_i (||w_i - w||^2 - gamma_i), dual ascent."""
    w = f.network
    lams, gammas = [lam] * len(f.clients), [gamma] * len(f.clients)
    for t, cohort in enumerate(f.cohorts):
        trained = []
        for i in cohort:
            w_i = deepcopy(w)
            sgd = f.sgd(w_i.parameters())
            for x, y in f.epoch_batches(i, t):
                violation = squared_distance(w_i, w) - gammas[i]
                step(sgd, F.cross_entropy(w_i(x), y) + lams[i] * violation)
            violation = squared_distance(w_i, w).item() - gammas[i]
            gammas[i] += alpha * lams[i]
            lams[i] = max(0.0, lams[i] + alpha * violation)
            trained.append(w_i)
        w = average_models(trained, [lams[i] / sum(lams[j] for j in cohort) for i in cohort])
        rows = torch.tensor([lams, gammas], dtype=torch.float64).T
        yield leaves_of(w), [{".own.lam": row[0], ".own.gamma": row[1]} for row in rows]


def scaffold(f: Federation, server_lr: float) -> Rounds:
    """Karimireddy et al., Algorithm 1 with option II: y_i <- y_i - lr (g_i(y_i) - c_i + c)."""
    x = f.network
    c = {n: torch.zeros_like(p) for n, p in x.named_parameters()}
    c_i = [dict(c) for _ in f.clients]
    for t, cohort in enumerate(f.cohorts):
        trained, changes = [], []
        for i in cohort:
            y, batches = deepcopy(x), f.epoch_batches(i, t)
            for images, labels in batches:
                loss = F.cross_entropy(y(images), labels)
                gradients = torch.autograd.grad(loss, list(y.parameters()))
                with torch.no_grad():
                    for (n, p), g in zip(y.named_parameters(), gradients, strict=True):
                        p -= f.lr * (g + f.weight_decay * p - c_i[i][n] + c[n])
            moved = {n: p - y.get_parameter(n).detach() for n, p in parameters_of(x).items()}
            new = {n: c_i[i][n] - c[n] + v / (len(batches) * f.lr) for n, v in moved.items()}
            changes.append({n: v - c_i[i][n] for n, v in new.items()})
            trained.append(y)
            c_i[i] = new
        mean = average_models(trained)
        y_mean = parameters_of(mean)
        x = copy_with(
            mean, {n: p + server_lr * (y_mean[n] - p) for n, p in parameters_of(x).items()}
        )
        mean_change = average(changes)
        c = {n: v + len(cohort) / len(f.clients) * mean_change[n] for n, v in c.items()}
        yield leaves_of(x) | named(".c.", c), [named(".c_i.", tree) for tree in c_i]


def moon(f: Federation, mu: float, tau: float) -> Rounds:
    """Li, He and Song, eqs. (2) and (3): CE + mu l_con, against the previous model's features."""
    w = f.network
    previous = [w for _ in f.clients]
    for t, cohort in enumerate(f.cohorts):
        trained = []
        for i in cohort:
            w_i, w_glob, w_prev = deepcopy(w), deepcopy(w).eval(), deepcopy(previous[i]).eval()
            sgd = f.sgd(w_i.parameters())
            for x, y in f.epoch_batches(i, t):
                z = w_i.features(x)
                near, far = (
                    (F.cosine_similarity(z, teacher.features(x).detach()) / tau).exp()
                    for teacher in (w_glob, w_prev)
                )
                l_con = -(near / (near + far)).log().mean()
                step(sgd, F.cross_entropy(w_i.head(z), y) + mu * l_con)
            trained.append(w_i)
            previous[i] = w_i
        w = average_models(trained, f.weights(cohort))
        yield (
            leaves_of(w),
            [named(".own.", leaves_of(v, "conv", "norm", "hidden")) for v in previous],
        )


def perfedavg(f: Federation, alpha: float, variant: str) -> Rounds:
    """Fallah et al., eqs. (3) and (7): SGD on F_i(w) = f_i(w - alpha grad f_i(w; D); D').

    D and D' are the samples at even and at odd positions of a mini-batch. The running statistics
    are those of the pass on D'.
    """
    w = f.network
    for t, cohort in enumerate(f.cohorts):
        trained = []
        for i in cohort:
            w_i = deepcopy(w)
            sgd, leaves = f.sgd(w_i.parameters()), dict(w_i.named_parameters())
            for x, y in f.epoch_batches(i, t):
                D, D_ = slice(0, None, 2), slice(1 if len(y) > 1 else 0, None, 2)
                loss = F.cross_entropy(call_aside(w_i, leaves, x[D]), y[D])
                gradients = torch.autograd.grad(
                    loss, list(leaves.values()), create_graph=variant == "hf"
                )
                steps = zip(leaves.items(), gradients, strict=True)
                adapted = {n: p - alpha * g for (n, p), g in steps}
                step(sgd, F.cross_entropy(functional_call(w_i, adapted, (x[D_],)), y[D_]))
            trained.append(w_i)
        w = average_models(trained, f.weights(cohort))
        yield leaves_of(w), [{} for _ in f.clients]


def call_aside(model: Network, parameters: Tree, x: Tensor) -> Tensor:
    """The logits of a pass in training mode that moves no running statistics."""
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return functional_call(model, parameters | buffers, (x,))


# A part of the model for each client


def shared_part(
    f: Federation, *shared: str, weights: str, phases: Sequence[tuple[int, int, Sequence[str]]]
) -> Rounds:
    """The leaves of some ``shared`` parts of the network are averaged, the others stay.

    phases: (first epoch, end, parts that train), each without momentum at its start.
    """
    models = [f.network for _ in f.clients]
    common = leaves_of(f.network, *shared)
    for t, cohort in enumerate(f.cohorts):
        for k in cohort:
            models[k] = w_k = copy_with(models[k], common)
            for first, end, parts in phases:
                trained = [p for n, p in w_k.named_parameters() if n.startswith(tuple(parts))]
                fit(w_k, f.sgd(trained), f.epoch_batches(k, t, first, end))
        common = average(
            [leaves_of(models[k], *shared) for k in cohort],
            f.weights(cohort) if weights == "samples" else None,
        )
        yield (
            common,
            [
                {n: v for n, v in leaves_of(model).items() if not n.startswith(shared)}
                for model in models
            ],
        )


def fedper(f: Federation) -> Rounds:
    """Arivazhagan et al.: base layers W_B are averaged, W_P_i = the head; both train together."""
    parts = "conv", "norm", "hidden", "head"
    return shared_part(f, *parts[:3], weights="samples", phases=[(0, f.epochs, parts)])


def fedrep(f: Federation, head_epochs: int) -> Rounds:
    """Collins et al., Algorithm 1: first the head h_i, then the body phi, which is averaged."""
    body = "conv", "norm", "hidden"
    phases = [(0, head_epochs, ["head"]), (head_epochs, f.epochs, body)]
    return shared_part(f, *body, weights="samples", phases=phases)


def fedbn(f: Federation) -> Rounds:
    """Li et al., Algorithm 1: all layers but BatchNorm are averaged with equal weights."""
    parts = "conv", "norm", "hidden", "head"
    phases = [(0, f.epochs, parts)]
    return shared_part(f, "conv", "hidden", "head", weights="uniform", phases=phases)


# A model for each client beside the common one


def ditto(f: Federation, lam: float) -> Rounds:
    """Li et al., Algorithm 1: v_i <- v_i - lr (grad F_i(v_i) + lam (v_i - w)), w as received."""
    w, v = f.network, [deepcopy(f.network) for _ in f.clients]
    for t, cohort in enumerate(f.cohorts):
        trained = []
        for i in cohort:
            w_i = deepcopy(w)
            fit(w_i, f.sgd(w_i.parameters()), f.epoch_batches(i, t))
            trained.append(w_i)
            sgd = f.sgd(v[i].parameters())
            for x, y in f.epoch_batches(i, t):
                step(sgd, F.cross_entropy(v[i](x), y) + lam / 2 * squared_distance(v[i], w))
        w = average_models(trained, f.weights(cohort))
        yield leaves_of(w), [named(".own.", leaves_of(v_i)) for v_i in v]


def pfedme(f: Federation, lam: float, inner_steps: int, inner_lr: float, beta: float) -> Rounds:
    """Dinh et al., Algorithm 1: theta_i by K steps on f_i + lam / 2 ||theta - w_i||^2 (7), then
    w_i <- w_i - lr lam (w_i - theta_i); w <- (1 - beta) w + beta mean w_i.

    Weight decay belongs to theta_i. The running statistics are those of theta_i and are averaged.
    """
    w = f.network
    theta = [parameters_of(w) for _ in f.clients]
    for t, cohort in enumerate(f.cohorts):
        trained = []
        for i in cohort:
            w_i, theta_i = parameters_of(w), deepcopy(w)
            for x, y in f.epoch_batches(i, t):
                for _ in range(inner_steps):
                    loss = F.cross_entropy(theta_i(x), y)
                    gradients = torch.autograd.grad(loss, list(theta_i.parameters()))
                    with torch.no_grad():
                        for (n, p), g in zip(theta_i.named_parameters(), gradients, strict=True):
                            p -= inner_lr * (g + lam * (p - w_i[n]) + f.weight_decay * p)
                for n, p in parameters_of(theta_i).items():
                    w_i[n] = w_i[n] - f.lr * lam * (w_i[n] - p)
            theta[i] = parameters_of(theta_i)
            trained.append(leaves_of(theta_i) | w_i)
        mean, old = average(trained, f.weights(cohort)), parameters_of(w)
        w = copy_with(w, mean | {n: (1 - beta) * p + beta * mean[n] for n, p in old.items()})
        yield leaves_of(w), [named(".own.", tree) for tree in theta]


def apfl(f: Federation, alpha: float, alpha_decay: float) -> Rounds:
    """Deng et al., Algorithm 1 and eq. (10): vbar_i = alpha_i v_i + (1 - alpha_i) w_i.

    alpha_i steps once at the start of a round, on a batch of its own.
    """
    w, v = f.network, [deepcopy(f.network) for _ in f.clients]
    alphas = [torch.tensor(alpha, dtype=torch.float64) for _ in f.clients]
    for t, cohort in enumerate(f.cohorts):
        trained = []
        for i in cohort:
            w_i, v_i = deepcopy(w), v[i]
            x, y = f.batches(i, t, "alpha 0")[0]
            vbar = mix_parameters(alphas[i], v_i, w_i)
            loss = F.cross_entropy(call_aside(v_i, vbar, x), y)
            gradients = torch.autograd.grad(loss, list(vbar.values()))
            pairs = zip(v_i.parameters(), w_i.parameters(), gradients, strict=True)
            slope = sum(((p - q) * g).sum().detach() for p, q, g in pairs)
            alphas[i] = (alphas[i] - f.lr * (slope + alpha_decay * alphas[i])).clamp(0, 1)

            sgd_v, sgd_w = f.sgd(v_i.parameters()), f.sgd(w_i.parameters())
            for x, y in f.epoch_batches(i, t):
                vbar = mix_parameters(alphas[i], v_i, w_i)
                step(sgd_v, F.cross_entropy(functional_call(v_i, vbar, (x,)), y))
                step(sgd_w, F.cross_entropy(w_i(x), y))
            trained.append(w_i)
        w = average_models(trained, f.weights(cohort))
        yield (
            leaves_of(w),
            [
                named(".own.", leaves_of(v_i)) | {".mix.alpha": a}
                for v_i, a in zip(v, alphas, strict=True)
            ],
        )


def mix_parameters(alpha: Tensor, v: Network, w: Network) -> Tree:
    """alpha v + (1 - alpha) w of the parameters; w is constant."""
    pairs = zip(v.named_parameters(), w.parameters(), strict=True)
    return {n: alpha * p + (1 - alpha) * q.detach() for (n, p), q in pairs}


def fedrod(f: Federation, gamma: float) -> Rounds:
    """Chen and Chao, eqs. (5)-(7): the generic model by CE(g + gamma log n_i), the personal head
    phi_i, which starts as a copy of the generic one, by CE(g + phi_i(z)) with g and z constant.
    """
    w = f.network
    phi = [deepcopy(w.head) for _ in f.clients]
    for t, cohort in enumerate(f.cohorts):
        trained = []
        for i in cohort:
            w_i, prior = deepcopy(w), gamma * f.class_counts(i).double().log()
            generic, personal = f.sgd(w_i.parameters()), f.sgd(phi[i].parameters())
            for x, y in f.epoch_batches(i, t):
                z = w_i.features(x)
                g = w_i.head(z)
                p = g.detach() + phi[i](z.detach())
                step(personal, F.cross_entropy(p, y))
                step(generic, F.cross_entropy(g + prior, y))
            trained.append(w_i)
        w = average_models(trained, f.weights(cohort))
        yield leaves_of(w), [named(".own.head.", leaves_of(head)) for head in phi]


def fedproto(f: Federation, lam: float) -> Rounds:
    """Tan et al., eqs. (3), (6) and (7): CE + lam MSE(z, P_y); P_c is the mean over the clients
    that hold the class c. Yields P and whether each class has one.
    """
    models = [deepcopy(f.network) for _ in f.clients]
    held = [torch.zeros_like(f.class_counts(k)).double() for k in f.clients]
    P: dict[int, Tensor] = {}
    for t, cohort in enumerate(f.cohorts):
        own: list[dict[int, Tensor]] = []
        for k in cohort:
            w = models[k]
            sgd = f.sgd(w.parameters())
            for x, y in f.epoch_batches(k, t):
                z = w.features(x)
                gaps = [(z[at] - P[c]).square().mean() for at, c in enumerate(y.tolist()) if c in P]
                step(sgd, F.cross_entropy(w.head(z), y) + lam * sum(gaps) / len(y))
            x, y = f.samples[k]
            z = deepcopy(w).eval().features(x).detach()
            own.append({c: z[y == c].mean(0) for c in y.unique().tolist()})
            held[k] = (f.class_counts(k) > 0).double()
        P = {
            c: torch.stack([means[c] for means in own if c in means]).mean(0)
            for c in sorted(set().union(*own))
        }
        yield (
            {f"P{c}": mean for c, mean in P.items()},
            [
                leaves_of(model) | {".own.classes": classes}
                for model, classes in zip(models, held, strict=True)
            ],
        )


# A mix for each client


def fedamp(
    f: Federation,
    lam: float,
    alpha: float,
    decay: float,
    sigma: float,
    self_weight: float,
    heuristic: bool,
) -> Rounds:
    """Huang et al., Algorithm 1: in round t first u_i = sum_j xi_ij w_j with alpha_t, then w_i by
    F_i(w) + lam / (2 alpha_t) ||w - u_i||^2; alpha_t = alpha decay^t.

    The mix is that of the last cohort. xi are the paper's; ``heuristic``: those of HeurFedAMP. The
    paper's u_i is linear in alpha_t: it is kept for alpha = 1, and read with that of the round.
    """
    w = [deepcopy(f.network) for _ in f.clients]
    u = [parameters_of(f.network) for _ in f.clients]
    for t, cohort in enumerate(f.cohorts):
        for i in cohort:
            alpha_t = alpha * decay**t
            sgd, strength = f.sgd(w[i].parameters()), lam / (2 * alpha_t)
            share = 1.0 if heuristic else alpha_t
            cloud = {n: p + share * (u[i][n] - p) for n, p in parameters_of(w[i]).items()}
            for x, y in f.epoch_batches(i, t):
                gap = sum(((p - cloud[n]) ** 2).sum() for n, p in w[i].named_parameters())
                step(sgd, F.cross_entropy(w[i](x), y) + strength * gap)
        flat = {j: torch.cat([p.flatten() for p in parameters_of(w[j]).values()]) for j in cohort}
        for i in cohort:
            if not heuristic:
                squares = {j: (flat[i] - flat[j]).square().sum() for j in cohort if j != i}
                xi = {j: torch.exp(-d / sigma) / sigma for j, d in squares.items()}
            else:
                cosines = {
                    j: torch.cosine_similarity(flat[i], flat[j], 0) for j in cohort if j != i
                }
                terms = {j: torch.exp(sigma * c) for j, c in cosines.items()}
                xi = {j: (1 - self_weight) * e / sum(terms.values()) for j, e in terms.items()}
            xi[i] = 1 - sum(xi.values())
            u[i] = average([parameters_of(w[j]) for j in xi], list(xi.values()))
        yield (
            {},
            [leaves_of(a) | named(".cloud.", b) for a, b in zip(w, u, strict=True)],
        )


# Low-rank parts


def low_rank_weights(base: Tree, factors: Factors, s: float = 1.0) -> Tree:
    """{weight: base + s B A} in the shapes of the weights."""
    return {n: base[n] + (s * B @ A).view_as(base[n]) for n, (A, B) in factors.items()}


def copies_to_train(factors: Factors) -> Factors:
    """Copies of the factors that require gradients."""
    return {
        n: (A.clone().requires_grad_(), B.clone().requires_grad_()) for n, (A, B) in factors.items()
    }


def detached(factors: Factors) -> Factors:
    return {n: (A.detach(), B.detach()) for n, (A, B) in factors.items()}


def named_factors(factors: Factors) -> Tree:
    return {
        f"{n}..{letter}": v
        for n, pair in factors.items()
        for letter, v in zip("AB", pair, strict=True)
    }


def fedlora(f: Federation, lora_epochs: int, absent: str) -> Rounds:
    """Wu et al., eqs. (2)-(8): theta_i = sigma + B_i A_i; first A_i and B_i train, then sigma.

    absent: stale, and a client outside the cohort counts with the last sigma; or exclude.
    """
    sigma = f.network
    tau = [f.factors(0) for _ in f.clients]
    for t, cohort in enumerate(f.cohorts):
        trained = []
        for i in cohort:
            sigma_i, tau_i = deepcopy(sigma), copies_to_train(tau[i])
            factors = [v for pair in tau_i.values() for v in pair]
            for sgd, batches in (
                (f.sgd(factors), f.epoch_batches(i, t, 0, lora_epochs)),
                (f.sgd(sigma_i.parameters()), f.epoch_batches(i, t, lora_epochs)),
            ):
                for x, y in batches:
                    theta_i = low_rank_weights(dict(sigma_i.named_parameters()), tau_i)
                    step(sgd, F.cross_entropy(functional_call(sigma_i, theta_i, (x,)), y))
            trained.append(sigma_i)
            tau[i] = detached(tau_i)
        missing = [sigma] * (len(f.clients) - len(cohort)) if absent == "stale" else []
        sigma = average_models(trained + missing)
        yield leaves_of(sigma), [named_factors(pairs) for pairs in tau]


def pfedlora(f: Federation, mu: float, adapter_epochs: int, scale: float) -> Rounds:
    """Yi et al.: the model w_k trains by (1 - mu) CE(F) + mu CE(F + theta), then the adapter theta
    beside the head by CE(F + theta); theta is averaged by samples.

    The running statistics move with F in the first part alone.
    """
    models = [deepcopy(f.network) for _ in f.clients]
    ((A, B),) = f.factors(0).values()
    for t, cohort in enumerate(f.cohorts):
        trained = []
        for k in cohort:
            w, theta = models[k], [A.clone().requires_grad_(), B.clone().requires_grad_()]
            sgd = f.sgd(w.parameters())
            for x, y in f.epoch_batches(k, t):
                z = w.features(x)
                both = w.head(z) + scale * z @ theta[0].T @ theta[1].T
                loss = (1 - mu) * F.cross_entropy(w.head(z), y) + mu * F.cross_entropy(both, y)
                step(sgd, loss)
            sgd = f.sgd(theta)
            for x, y in f.epoch_batches(k, t, f.epochs, f.epochs + adapter_epochs):
                z = deepcopy(w).features(x)
                both = w.head(z) + scale * z @ theta[0].T @ theta[1].T
                step(sgd, F.cross_entropy(both, y))
            trained.append({"A": theta[0].detach(), "B": theta[1].detach()})
        mean = average(trained, f.weights(cohort))
        A, B = mean["A"], mean["B"]
        yield named(".adapter..", mean), [leaves_of(w) for w in models]


def tune(
    f: Federation, k: int, t: int, base: Tree, head: Tree, factors: Factors, s: float
) -> tuple[Tree, Factors]:
    """The head and the factors of client k after their training on the frozen ``base``; BatchNorm
    uses its first statistics.
    """
    network, factors = deepcopy(f.network).eval(), copies_to_train(factors)
    head = {n: v.clone().requires_grad_() for n, v in head.items()}
    sgd = f.sgd([*head.values(), *(v for pair in factors.values() for v in pair)])
    for x, y in f.epoch_batches(k, t):
        weights = base | low_rank_weights(base, factors, s) | head
        step(sgd, F.cross_entropy(functional_call(network, weights, (x,)), y))
    return {n: v.detach() for n, v in head.items()}, detached(factors)


def take_rank(factors: Factors, rank: int) -> Factors:
    """The first ``rank`` components."""
    return {n: (A[:rank], B[:, :rank]) for n, (A, B) in factors.items()}


def fedit(f: Federation, lora_ranks: Sequence[int], alpha: float) -> Rounds:
    """Zhang et al.: A <- sum_k p_k A_k and B <- sum_k p_k B_k, padded with zeros; s = alpha / R."""
    base, head, s = parameters_of(f.network), leaves_of(f.network, "head"), alpha / max(lora_ranks)
    factors = f.factors(0)
    for t, cohort in enumerate(f.cohorts):
        trees = []
        for k in cohort:
            received = take_rank(factors, lora_ranks[k % len(lora_ranks)])
            head_k, factors_k = tune(f, k, t, base, head, received, s)
            padded = {}
            for n, (A, B) in factors_k.items():
                missing = len(factors[n][0]) - len(A)
                padded[n] = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
            trees.append(head_k | named_factors(padded))
        mean = average(trees, f.weights(cohort))
        head = {n: mean[n] for n in head}
        factors = {n: (mean[f"{n}..A"], mean[f"{n}..B"]) for n in factors}
        yield mean, [{} for _ in f.clients]


def flora(f: Federation, lora_ranks: Sequence[int], alpha: float) -> Rounds:
    """Wang et al.: W <- W + s [B_1 ... B_K] [p_1 A_1; ...; p_K A_K], from new A_k and B_k = 0."""
    base, head, s = parameters_of(f.network), leaves_of(f.network, "head"), alpha / max(lora_ranks)
    start = base
    for t, cohort in enumerate(f.cohorts):
        heads, stacks = [], []
        for k in cohort:
            received = take_rank(f.factors(t), lora_ranks[k % len(lora_ranks)])
            head_k, factors_k = tune(f, k, t, base, head, received, s)
            heads.append(head_k)
            stacks.append(factors_k)
        p = f.weights(cohort)
        stacked = {
            n: (
                torch.cat([p_k * pairs[n][0] for p_k, pairs in zip(p, stacks, strict=True)]),
                torch.cat([pairs[n][1] for pairs in stacks], 1),
            )
            for n in stacks[0]
        }
        base, head = base | low_rank_weights(base, stacked, s), average(heads, p)
        change = {n: (base[n] - start[n]).reshape(len(B), -1) for n, (A, B) in stacked.items()}
        yield head | {f"{n}..W": W for n, W in change.items()}, [{} for _ in f.clients]


def best_approximation(W: Tensor, rank: int, s: float) -> tuple[Tensor, Tensor]:
    """A = V_r' and B = U_r S_r / s of W = U S V'."""
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return V[:rank], U[:, :rank] * S[:rank] / s


def flexlora(f: Federation, lora_ranks: Sequence[int], alpha: float) -> Rounds:
    """Bai et al.: W <- sum_k p_k s_k B_k A_k, and client k gets the best W of rank r_k;
    s_k = alpha / r_k. Yields W and its best approximation of the largest rank.
    """
    base, head = parameters_of(f.network), leaves_of(f.network, "head")
    first, W = f.factors(0), {}
    for t, cohort in enumerate(f.cohorts):
        heads, products = [], []
        for k in cohort:
            rank = lora_ranks[k % len(lora_ranks)]
            s = alpha / rank
            received = {n: best_approximation(w, rank, s) for n, w in W.items()}
            head_k, factors_k = tune(f, k, t, base, head, received or take_rank(first, rank), s)
            heads.append(head_k)
            products.append({n: s * B @ A for n, (A, B) in factors_k.items()})
        p = f.weights(cohort)
        head, W = average(heads, p), average(products, p)
        yield head | named_products(W, max(lora_ranks)), [{} for _ in f.clients]


def raflora(f: Federation, lora_ranks: Sequence[int], alpha: float) -> Rounds:
    """Wu et al.: component i of s_k B_k A_k is averaged over the clients with r_k >= i, and client k
    gets the best W of rank r_k; s_k = alpha / r_k. Yields what ``flexlora`` yields.
    """
    base, head = parameters_of(f.network), leaves_of(f.network, "head")
    first, W = f.factors(0), {}
    for t, cohort in enumerate(f.cohorts):
        heads, clients = [], []
        for k in cohort:
            rank = lora_ranks[k % len(lora_ranks)]
            s = alpha / rank
            received = {n: best_approximation(w, rank, s) for n, w in W.items()}
            head_k, factors_k = tune(f, k, t, base, head, received or take_rank(first, rank), s)
            heads.append(head_k)
            clients.append((f.size(k), s, factors_k))
        head, W = average(heads, f.weights(cohort)), {}
        for n, (A, B) in first.items():
            W[n] = torch.zeros(len(B), A.shape[1], dtype=A.dtype)
            for i in range(len(A)):
                having = [(size, s, tree[n]) for size, s, tree in clients if i < len(tree[n][0])]
                total = sum(size for size, *_ in having)
                for size, s, (A_k, B_k) in having:
                    W[n] += size / total * s * torch.outer(B_k[:, i], A_k[i])
        yield head | named_products(W, max(lora_ranks)), [{} for _ in f.clients]


def fedsa_lora(f: Federation, lora_ranks: Sequence[int], alpha: float) -> Rounds:
    """Guo et al.: A <- sum_k p_k A_k; B_k and the head stay. A row is averaged over who has it."""
    base, s = parameters_of(f.network), alpha / max(lora_ranks)
    factors = f.factors(0)
    ranks = [lora_ranks[k % len(lora_ranks)] for k in f.clients]
    heads = [leaves_of(f.network, "head") for _ in f.clients]
    own = [{n: B for n, (_, B) in take_rank(factors, rank).items()} for rank in ranks]
    A = {n: pair[0].clone() for n, pair in factors.items()}
    for t, cohort in enumerate(f.cohorts):
        trained = {}
        for k in cohort:
            received = {n: (A[n][: ranks[k]], B) for n, B in own[k].items()}
            heads[k], pairs = tune(f, k, t, base, heads[k], received, s)
            own[k] = {n: B for n, (_, B) in pairs.items()}
            trained[k] = {n: A_k for n, (A_k, _) in pairs.items()}
        for n, rows in A.items():
            for i in range(len(rows)):
                having = [k for k in cohort if i < ranks[k]]
                if having:
                    p = f.weights(having)
                    rows[i] = sum(w * trained[k][n][i] for w, k in zip(p, having, strict=True))
        yield (
            {f"{n}..A": v.clone() for n, v in A.items()},
            [heads[k] | {f"{n}..B": B for n, B in own[k].items()} for k in f.clients],
        )


def fedhl(f: Federation, lora_ranks: Sequence[int], alpha: float, eps: float) -> Rounds:
    """Peng et al.: W <- W + sum_k p_k (W_k - W^(r_k)) with p_k ~ 1 / (t_k^2 + eps), t_k the sum of
    the squared singular values of W that client k does not receive, over all layers (8), (15).
    """
    base, head = parameters_of(f.network), leaves_of(f.network, "head")
    first = f.factors(0)
    W = {n: torch.zeros(len(B), A.shape[1], dtype=B.dtype) for n, (A, B) in first.items()}
    for t, cohort in enumerate(f.cohorts):
        heads, changes, tails = [], [], []
        for k in cohort:
            rank = lora_ranks[k % len(lora_ranks)]
            s = alpha / rank
            received = take_rank(first, rank)
            if t:
                received = {n: best_approximation(w, rank, s) for n, w in W.items()}
            head_k, factors_k = tune(f, k, t, base, head, received, s)
            heads.append(head_k)
            changes.append(
                {
                    n: s * B @ A - s * received[n][1] @ received[n][0]
                    for n, (A, B) in factors_k.items()
                }
            )
            tails.append(
                float(sum(torch.linalg.svdvals(w)[rank:].square().sum() for w in W.values()))
            )
        p = [1 / (tail**2 + eps) for tail in tails]
        mean = average(changes, [p_k / sum(p) for p_k in p])
        head, W = average(heads, f.weights(cohort)), {n: w + mean[n] for n, w in W.items()}
        yield head | named_products(W, max(lora_ranks)), [{} for _ in f.clients]


def named_products(W: Tree, rank: int) -> Tree:
    """W of each weight, and its best approximation of this rank."""
    pairs = {n: best_approximation(w, rank, 1.0) for n, w in W.items()}
    return {f"{n}..W": w for n, w in W.items()} | {f"{n}..BA": B @ A for n, (A, B) in pairs.items()}
