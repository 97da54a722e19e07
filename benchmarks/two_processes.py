"""A FedLoRA round of the paper's CIFAR-10 set-up: `mpirun -n 3` against a loop written by hand.

The hand-written side is two processes that share the 40 clients: nn.Modules in channels_last with
glibc told to keep its memory, torch.optim.SGD, tau cached while sigma trains, mean of sigma through
shared memory, evaluation of every client. It logs, checkpoints and checks nothing.

    python benchmarks/two_processes.py [--root DATA] [--clients 40] [--rounds 2]

Without --root the images are synthetic, of the same shape and number.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import torch
import torch.multiprocessing as processes
from report import MPIRUN, arguments, tell
from torch import nn
from torch.nn import functional as F

from fedlora_mpi.config import from_dict
from fedlora_mpi.engine.device import retain_freed_memory
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.store.reader import RunFiles

EPOCHS, LORA_EPOCHS, BATCH, RATIO, LINEAR = 5, 2, 100, 0.6, 4


class LowRankConv(nn.Conv2d):
    """A convolution whose weight is its own plus scale * B A."""

    def split(self) -> None:
        r = int(RATIO * self.out_channels)
        kernel = self.kernel_size[0]
        self.lora_A = nn.Parameter(
            torch.empty(r * kernel, self.in_channels * kernel).uniform_(-0.01, 0.01)
        )
        self.lora_B = nn.Parameter(torch.zeros(self.out_channels * kernel, r * kernel))
        self.scale, self.cached = 1 / r, None

    def forward(self, x):
        tau = self.cached if self.cached is not None else self.tau()
        return F.conv2d(x, self.weight + tau, None, self.stride, self.padding)

    def tau(self):
        return ((self.lora_B * self.scale) @ self.lora_A).view(self.weight.shape)


class LowRankLinear(nn.Linear):
    """A Linear whose weight is its own plus scale * B A."""

    def split(self) -> None:
        self.lora_A = nn.Parameter(torch.empty(LINEAR, self.in_features).uniform_(-0.01, 0.01))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, LINEAR))
        self.scale, self.cached = 1 / LINEAR, None

    def forward(self, x):
        return F.linear(
            x, self.weight + (self.cached if self.cached is not None else self.tau()), self.bias
        )

    def tau(self):
        return (self.lora_B * self.scale) @ self.lora_A


def decompose(module: nn.Module) -> nn.Module:
    """Turn every convolution and Linear of ``module`` into its low-rank version, in place."""
    for layer in module.modules():
        if type(layer) in (nn.Conv2d, nn.Linear):
            layer.__class__ = LowRankConv if isinstance(layer, nn.Conv2d) else LowRankLinear
            layer.split()
    return module.to(memory_format=torch.channels_last)


def train_client(net: nn.Module, feed, client: int, cache: bool) -> None:
    """Both phases of one client."""
    low = [p for n, p in net.named_parameters() if "lora_" in n]
    rest = [p for n, p in net.named_parameters() if "lora_" not in n]
    layers = [m for m in net.modules() if hasattr(m, "lora_A")]
    net.train()
    for phase, (trained, frozen, epochs) in enumerate(
        ((low, rest, LORA_EPOCHS), (rest, low, EPOCHS - LORA_EPOCHS))
    ):
        for p in trained:
            p.requires_grad_(True)
        for p in frozen:
            p.requires_grad_(False)
        for layer in layers:
            layer.cached = layer.tau().detach() if cache and phase else None
        optimizer = torch.optim.SGD(trained, 0.1, 0.9)
        for epoch in range(epochs):
            batches = feed.epoch([client], 0, epoch)
            for first in range(0, feed.train_size(client), BATCH):
                batch = batches.batch(1, first, min(BATCH, feed.train_size(client) - first))
                optimizer.zero_grad()
                F.cross_entropy(net(batch.x[0]), batch.y[0]).backward()
                optimizer.step()
    net.eval()


def half(rank: int, tree: dict, clients: list[int], total: torch.Tensor, rounds: int, out) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    retain_freed_memory()
    built = build(from_dict(tree, "benchmark"), "benchmark", Solo())
    (client_type,) = built.federation.clients.types
    feed = client_type.trainer.feed
    blank = client_type.trainer.model.to_module(client_type.initial.shared)
    net = decompose(blank)
    low = {c: {n: v.clone() for n, v in net.state_dict().items() if "lora_" in n} for c in clients}
    sigma = {n: v.clone() for n, v in net.state_dict().items() if "lora_" not in n}
    for round_ in range(rounds):
        out.wait()
        begin = time.perf_counter()
        total.zero_() if rank == 0 else None
        mine = torch.zeros_like(total)
        for client in clients:
            # BatchNorm adds its counter
            net.load_state_dict({**sigma, **low[client]}, strict=False)
            train_client(net, feed, client, cache=True)
            state = net.state_dict()
            low[client] = {n: state[n].clone() for n in low[client]}
            mine += torch.cat([state[n].flatten() for n in sigma])
        total += mine
        out.wait()
        parts = (total / 40).split([v.numel() for v in sigma.values()])
        sigma = {n: p.view(v.shape) for (n, v), p in zip(sigma.items(), parts, strict=True)}
        right = 0.0
        for client in clients:
            # BatchNorm adds its counter
            net.load_state_dict({**sigma, **low[client]}, strict=False)
            batch = feed.test_batch([client], 0, feed.test_size(client))
            with torch.no_grad():
                right += float((net(batch.x[0]).argmax(1) == batch.y[0]).float().mean())
        out.wait()
        if rank == 0:
            print(
                f"  by hand, round {round_ + 1}: {time.perf_counter() - begin:.1f} s",
                file=sys.stderr,
                flush=True,
            )
            seconds[round_] = time.perf_counter() - begin


def main() -> None:
    global seconds
    parser = arguments(__doc__)
    parser.add_argument("--root", help="folder of CIFAR-10")
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    data = {
        "dataset": "synthetic",
        "synthetic": {"size": 32, "channels": 3, "train": 50000, "test": 10000},
    }
    if asked.root:
        data = {"dataset": "cifar10", "root": asked.root}
    data["partition"] = {"kind": "dirichlet_client", "alpha": 0.1, "clients": asked.clients}
    tree = {
        "rounds": asked.rounds,
        "data": data,
        "model": "resnet8",
        "algorithm": {
            "name": "fedlora",
            "lora_epochs": LORA_EPOCHS,
            "conv_rank": RATIO,
            "linear_rank": LINEAR,
            "rank_rule": "official",
            "scale": "official",
        },
        "train": {"epochs": EPOCHS, "batch_size": BATCH},
    }
    seconds = torch.zeros(asked.rounds).share_memory_()
    context = processes.get_context("fork")
    built = build(from_dict(tree, "benchmark"), "benchmark", Solo())
    total = torch.zeros(built.federation.aggregator.terms.size).share_memory_()
    barrier = context.Barrier(2)
    del built
    halves = [
        context.Process(
            target=half,
            args=(r, tree, list(range(r, asked.clients, 2)), total, asked.rounds, barrier),
        )
        for r in (0, 1)
    ]
    for process in halves:
        process.start()
    for process in halves:
        process.join()
    ours = framework(tree)
    ratio = ours[-1] / float(seconds[-1])
    row = {
        "clients": asked.clients,
        "by hand s/round": float(seconds[-1]),
        "mpirun -n 3 s/round": ours[-1],
        "ratio": ratio,
    }
    tell(asked, [row])


def framework(tree: dict) -> list[float]:
    """Seconds of each round under mpirun -n 3."""
    with tempfile.TemporaryDirectory() as folder:
        config, output = os.path.join(folder, "config.yaml"), os.path.join(folder, "run")
        with open(config, "w") as file:
            json.dump({**tree, "output": output}, file)  # JSON is YAML
        environment = {
            **os.environ,
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        mpirun = os.path.join(os.path.dirname(sys.executable), "mpirun")
        command = [mpirun, "-n", "3", *MPIRUN[1:], sys.executable, "-m", "fedlora_mpi"]
        subprocess.run([*command, "run", config], check=True, env=environment)
        rounds = RunFiles(output).rounds()
        return sum(
            rounds[f"seconds_{stage}"] for stage in ("train", "exchange", "evaluate")
        ).tolist()


if __name__ == "__main__":
    main()
