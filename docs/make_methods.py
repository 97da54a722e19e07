"""Fill the generated parts of ``methods.md`` and ``add_a_method.md`` from the code: ``python
docs/make_methods.py``.

The pages are prose with marked places: ``<!-- overview -->``, ``<!-- symbols -->``, ``<!-- hooks
-->`` and, under the heading of every method, ``<!-- facts of NAME -->``, each up to the next ``<!--
end -->``. What stands between is made here: numbers are measured on ``REFERENCE``, sentences are
those of the docstrings. Only ``SAID`` is typed; ``tests/test_docs.py`` compares its formulas with
the measurement, and the pages with the code.
"""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import partial
from math import ceil, prod
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import torch

from fedlora_mpi import algorithms
from fedlora_mpi.aggregation.client_mix import Mixing
from fedlora_mpi.aggregation.neighbour_mix import NeighbourMixing
from fedlora_mpi.aggregation.svd import right_vectors
from fedlora_mpi.aggregation.topology import Complete, mixing_matrix
from fedlora_mpi.algorithm import (
    HOOKS,
    Aggregate,
    Algorithm,
    Reports,
    Transport,
    Update,
    Variables,
)
from fedlora_mpi.components.gating import cut_tensors
from fedlora_mpi.components.lora import FineTuning
from fedlora_mpi.components.lowrank import LowRank, matrix_shape
from fedlora_mpi.config.method_settings import method_settings
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import Tree, nbytes, numel, tmap
from fedlora_mpi.models.network import Model
from fedlora_mpi.models.zoo import build
from fedlora_mpi.mpi.comm import Solo

PAGE = Path(__file__).with_name("methods.md")
GUIDE = PAGE.with_name("add_a_method.md")
REFERENCE = ("resnet8", {}, 10, (3, 32, 32), 1)  # the paper's network for CIFAR-10
SOURCE = "../fedlora_mpi/algorithms"
MARK = re.compile(r"<!-- (overview|symbols|hooks|facts of (\w+)) -->\n.*?<!-- end -->", re.DOTALL)
HEADING = re.compile(r"^### (.+)\n+<!-- facts of (\w+) -->$", re.MULTILINE)


class Bytes(NamedTuple):
    """Per client and round, and what lies still; numbers when measured, formulas when said."""

    up: int | str
    down: int | str
    personal: int | str = "0"  # of one client, on its worker and in a checkpoint
    server: int | str = "0"  # beside the shared variables


class Said(NamedTuple):
    """What is typed of a method."""

    shared: str
    personal: str = "–"
    bytes: Bytes = Bytes("4 * (P + F)", "4 * (P + F)")
    server: str = "–"
    settings: Mapping[str, Any] = {}  # those that REFERENCE needs, where it is not the defaults'


ALL = "4 * (P + F)"
BODY = "4 * (P + F - H)"
SAID = {
    "local": Said("–", "everything", Bytes("0", "0", ALL)),
    "fedavg": Said("everything"),
    "fedavg_ft": Said("everything"),
    "fedlora": Said("full-rank sigma", "low-rank tau: its factors A and B", Bytes(ALL, ALL, "4 * T")),
    "local_lora": Said("–", "sigma, and tau's factors A and B", Bytes("0", "0", "4 * (P + F + T)")),
    "fedavg_lora": Said("sigma, and tau's factors A and B", bytes=Bytes(*2 * ["4 * (P + F + T)"])),
    "fedper": Said("all but the head", "head", Bytes(BODY, BODY, "4 * H")),
    "fedrep": Said("all but the head", "head", Bytes(BODY, BODY, "4 * H")),
    "fedbabu": Said("all but the head", "head, the same for all and frozen", Bytes(BODY, BODY, "4 * H")),
    "elastic_head": Said("the body, the mean head", "head", Bytes(ALL, ALL, "4 * H")),
    "fedbn": Said("all but normalisation layers", "normalisation layers",
                  Bytes("4 * (P - A)", "4 * (P - A)", "4 * (A + F)")),
    "fedrod": Said("everything, with the generic head", "a second head", Bytes(ALL, ALL, "4 * H")),
    "pfedsd": Said("everything", "last own model, whether there is one", Bytes(ALL, ALL, "4 * (P + F + 1)")),
    "moon": Said("everything", "last own model without its head", Bytes(ALL, ALL, BODY)),
    "fedamp": Said("a mix of the parameters for every client", "own model, its mix u_i",
                   Bytes("4 * P", "4 * P", "4 * (2 * P + F)")),
    "depositum_like": Said("x_i and y_i, with each neighbour", "own model; y_i, g_i and nu_i",
                           Bytes("4 * (2 * P + F)", "4 * (2 * P + F)", "4 * (4 * P + F)")),
    "dpsgd": Said("the model, with each neighbour", "own model", Bytes(ALL, ALL, ALL)),
    "fedcac": Said("the mean, and a mix for every client", "its mix, a mask of critical entries, statistics",
                   Bytes("4 * P + ceil(P / 8)", "8 * P", "4 * (P + F) + P")),
    "fedpac": Said("body, class means; a mix of heads for every client", "head, h_i and V_i",
                   Bytes("4 * (P + F + 2 * K * d + K + 1)", "4 * (P + F + K * d + K)", "4 * (H + K * d + 1)")),
    "pfedgate": Said("everything", "the gate, its statistics, its multipliers M",
                     Bytes(ALL, ALL, "4 * (G * (x + 5) + 3 * c + 6)")),
    "fedprox": Said("everything"),
    "fedlc": Said("everything"),
    "fedga": Said("everything"),
    "fedbc": Said("everything", "its multiplier lam_i", Bytes("4 * (P + F + 1)", ALL, "4")),
    "bound_weight_like": Said("everything", "the last gap of its bounds", Bytes("4 * (P + F + 1)", ALL, "4")),
    "ota_ffl_like": Said("everything", "its loss f_k, and m_k and s_k of its update",
                         Bytes("4 * (P + F + 3)", ALL, "12")),
    "scaffold": Said("everything, and the control variate c", "control variate c_i",
                     Bytes("4 * (2 * P + F)", "4 * (2 * P + F)", "4 * P")),
    "fedglomo": Said("everything, and the parameters of the round before",
                     bytes=Bytes("4 * (2 * P + F)", "4 * (2 * P + F)", server="4 * P"), server="u"),
    "fedimpro": Said("everything, and the moments of the features of each class",
                     bytes=Bytes(*2 * ["4 * (P + F + 2 * K * d)"])),
    "ditto": Said("everything", "a second model v_i", Bytes(ALL, ALL, ALL)),
    "apfl": Said("everything", "a second model v_i, its share alpha_i", Bytes(ALL, ALL, "4 * (P + F + 1)")),
    "pfedme": Said("everything", "theta_i, anew in every round", Bytes(ALL, ALL, "4 * P")),
    "fedala": Said("everything", "top layers of the last own model, mixing weights A_i",
                   Bytes(ALL, ALL, "8 * H")),
    "perfedavg": Said("everything"),
    "fedavgm": Said("everything", bytes=Bytes(ALL, ALL, server="4 * P"), server="v"),
    "fedadagrad": Said("everything", bytes=Bytes(ALL, ALL, server="8 * P"), server="m, v"),
    "fedadam": Said("everything", bytes=Bytes(ALL, ALL, server="8 * P"), server="m, v"),
    "fedyogi": Said("everything", bytes=Bytes(ALL, ALL, server="8 * P"), server="m, v"),
    "fml": Said("the small network", "the network", Bytes("4 * S", "4 * S", ALL)),
    "fedkd": Said("the small network, by truncated SVDs", "the network, a matrix W_h",
                  Bytes("4 * S", "4 * S", "4 * (P + F + 500 * d)", "4"), "size of its last message"),
    "fedapen": Said("the small network", "the network, a share w", Bytes("4 * S", "4 * S", "4 * (P + F + 1)")),
    "pfedlora": Said("the adapter", "the network", Bytes("4 * 8 * (d + K)", "4 * 8 * (d + K)", ALL)),
    "lg_fedavg": Said("head", "all but the head", Bytes("4 * H", "4 * H", BODY)),
    "fd": Said("mean outputs by class", "the network, own mean outputs, the round they are of",
               Bytes("4 * K * K", "4 * K * K", "4 * (P + F + K * K + 1)")),
    "fedhpl_like": Said("sums of logits by class, and how many samples these are of",
                        "head, prompts (none beside `resnet8`), own logits, the round they are of",
                        Bytes(*2 * ["4 * (K * K + K)"], "4 * (H + K * K + K + 1)"), settings={"prompts": 0}),
    "fedproto": Said("prototypes", "the network, which classes it holds",
                     Bytes("4 * K * d", "4 * K * d", "4 * (P + F + K)")),
    "fedit": Said("factors A and B, head", bytes=Bytes("4 * (H + Q)", "4 * (H + Q)")),
    "flexlora": Said("the factors of its rank, head; the update W on the server alone",
                     bytes=Bytes("4 * (H + Q)", "4 * (H + Q)")),
    "raflora": Said("the factors of its rank, head; the update W on the server alone",
                    bytes=Bytes("4 * (H + Q)", "4 * (H + Q)")),
    "aggregation_broadcast": Said("factors A and B, head", bytes=Bytes("4 * (H + Q)", "4 * (H + Q)")),
    "fedhl": Said("the factors of its rank, head; the update W on the server alone",
                  bytes=Bytes("4 * (H + Q)", "4 * (H + Q)")),
    "fedex_lora": Said("factors A and B, head, update W", bytes=Bytes("4 * (H + Q)", "4 * (H + Q + W)", server="4"),
                       server="clients of the last round"),
    "flora": Said("head, update W; fresh factors every round",
                  bytes=Bytes("4 * (H + Q)", "4 * (H + Q)", server="4 * w"), server="stacked ranks of the last round"),
    "hetlora": Said("factors A and B, head", "the rank r_k", Bytes("4 * (H + Q + 1)", "4 * (H + Q)", "4")),
    "ffa_lora": Said("factors B, head", bytes=Bytes(*2 * ["4 * (H + b)"])),
    "fedsa_lora": Said("factors A", "factors B, head", Bytes("4 * a", "4 * a", "4 * (H + b)")),
    "rolora": Said("factors B or A in turn, head", bytes=Bytes(*2 * ["4 * (H + max(a, b))"])),
    "fed_rac_lora": Said("one factor, head; the seed of the other", bytes=Bytes("4 * (H + b)", "4 * (H + b + 1)")),
    "fed_talora": Said("factors A and B, update W, the head's rows of the classes seen",
                       bytes=Bytes("4 * (H + Q)", "4 * (H + Q + W)", server="4"), server="clients of the last round"),
}  # fmt: skip


# The numbers.


def reference_method(name: str) -> Algorithm:
    """A method with settings that fit ``REFERENCE``: the defaults, or those of ``SAID``."""
    return algorithms.find_algorithm(name)(**SAID[name].settings)


def measured(algorithm: Algorithm, model: Model) -> Bytes:
    """What a round counts as ``bytes_up`` and ``bytes_down`` of one client, and what is kept.

    Where what is sent depends on the client, the most: when it holds all classes and all are known.
    """
    first, transport = algorithm.init(model, rng(1, "init")), algorithm.transport(0, 1)
    server = algorithm.server(model, first.shared)
    offer = algorithm.upload(first, first, 0).mix
    if offer and offer.over_topology:  # to one neighbour, and from it
        matrix = mixing_matrix(Complete(), 2)
        mixed = NeighbourMixing.of(offer, matrix, [0, 0], [0]).bytes_of(0, {0, 1})
    else:
        mixing = Mixing.of(algorithm, first, [0], [0], "auto")
        mixed = (mixing.bytes_up, mixing.bytes_down) if mixing else (0, 0)

    def upload_numel(v: Variables) -> int:
        return transport.method.upload(v, v, 0).sent_numel

    def download_numel(round_: int, server: Tree, shared: Tree) -> int:
        count = transport.download_numel
        return int(count(server, shared, round_)) if count else numel(transport.download(shared))

    def ones(tree: Tree) -> Tree:
        return tmap(torch.ones_like, tree)

    arrived = first._replace(shared=transport.download(first.shared))
    up = max(map(upload_numel, (arrived, Variables(*map(ones, arrived[:2])))))
    update = served_once(algorithm, transport, server, first)
    down = max(
        download_numel(0, server, first.shared),
        download_numel(0, ones(server), ones(first.shared)),
        download_numel(1, update.server, update.shared),
    )
    return Bytes(4 * up + mixed[0], 4 * down + mixed[1], nbytes(first.personal), nbytes(server))


def served_once(
    algorithm: Algorithm, transport: Transport, server: Tree, first: Variables
) -> Update:
    """What the server makes of one client that has learned nothing."""
    term = transport.untrained_term(first, first.shared)
    reports = Reports.of({0: transport.untrained_upload(first, first.shared)})
    aggregate = Aggregate(term.mean, term.sum, term.metrics, 0, 1, 1.0, 1.0, reports)
    return algorithm.server_update(server, first.shared, aggregate, partial(right_vectors, Solo()))


def symbols(model: Model) -> dict[str, tuple[int, str]]:
    """Letter of the formulas -> (its number for ``model``, what it counts)."""

    def count(*roles):
        return sum(v.numel() for n, v in model.initial.items() if model.role(n) in roles)

    classes, width = model.leaves[f"{model.head}.weight"].shape
    ranks, adapted = LowRank().ranks(model), FineTuning().adapted_shapes(model)
    a = {n: min(8, *size) * size[1] for n, size in adapted.items()}
    b = {n: min(8, *size) * size[0] for n, size in adapted.items()}
    return {
        "P": (count("body", "norm", "head"), "parameters"),
        "F": (count("stats"), "running statistics of BatchNorm: a mean and a variance per channel"),
        "H": (count("head"), "parameters of the head, the last Linear"),
        "A": (count("norm"), "parameters of normalisation layers"),
        "K": (classes, "classes"),
        "d": (width, "features that enter the head"),
        "S": (
            numel(build("cnn5", {}, model.classes, model.shape, 1).initial),
            "numbers of the small network `cnn5`",
        ),
        "Q": (
            sum(a.values()) + sum(b.values()),
            "numbers of A and B of rank 8 in all weights but the head",
        ),
        "a": (sum(a.values()), "those of A alone"),
        "b": (sum(b.values()), "those of B alone"),
        "W": (sum(prod(size) for size in adapted.values()), "numbers of these weights themselves"),
        "w": (len(adapted), "how many weights these are"),
        "T": (
            sum(r * sum(matrix_shape(model.leaves[n])) for n, r in ranks.items()),
            "numbers of all A and B, default ranks",
        ),
        "G": (
            sum(cut.count for cut in cut_tensors(model, blocks=5).values()),
            "runs of weights that pFedGate's gate scales",
        ),
        "x": (prod(model.shape), "numbers of one input"),
        "c": (model.shape[0], "channels of one input"),
    }


def computed(said: Bytes, letters: dict[str, tuple[int, str]]) -> Bytes:
    """The formulas of ``said`` in numbers, by the ``symbols`` of a network."""
    known = {letter: number for letter, (number, _) in letters.items()}
    return Bytes(*(eval(formula, {"ceil": ceil, "max": max}, known) for formula in said))


# The sentences.


class Text(NamedTuple):
    """A docstring of ``algorithms/`` in its parts."""

    sentence: str
    paper: str  # Markdown: authors, the linked title, where it appeared; "–" for none
    short: str  # the authors alone, linked
    body: str  # the equations with what stands around them, as it is
    batchnorm: str
    deviations: str


CITATION = re.compile(
    r' ([A-Z][^".:;()]*\.?), "(.+?),?"(?: \([^()]*\))?, (.*?), (https://\S*?)(?=[,.;]? )'
)


def text_of(name: str) -> Text:
    """The parts of a method's docstring;
    one that says "(see ``other.py``)" has the other's paper."""
    text = inspect.getmodule(algorithms.find_algorithm(name)).__doc__
    sentence, rest = text.split("\n\n", 1)
    body = rest[: rest.index("BatchNorm: ")]
    batchnorm, deviations = re.search(
        r"BatchNorm: (.*?) Bytes per client and round: .*?(?: Deviations: (.*))?$",
        " ".join(rest.split()),
    ).groups()
    if other := re.search(r"\(see ``(\w+)\.py``\)", body):
        _, paper, short, *_ = text_of(other[1])
    else:
        cited = CITATION.findall(" " + " ".join(body.split()) + " ")
        paper = (
            "; ".join(f"{who}, [{title}]({url}), {where}" for who, title, where, url in cited)
            or "–"
        )
        short = "; ".join(f"[{who}]({url})" for who, _, _, url in cited) or "–"
        body = re.split(r"https://\S*[,.;]\s", body)[-1]
    opening, *equations = body.strip().split("\n\n")
    opening = " ".join(opening.split())
    opening = fill(opening[0].upper() + opening[1:], 100)
    body = "\n\n".join([opening, *equations])
    return Text(
        sentence, paper, short, body, _markdown(batchnorm), _markdown(deviations or "none.")
    )


def _markdown(text: str) -> str:
    """A docstring's sentence, with nothing that Markdown would take for its own."""
    parts = re.split(r"``(.*?)``", text)
    escaped = [re.sub(r"([*<])", r"\\\1", part) for part in parts]
    return "".join(f"`{code}`" if at % 2 else escaped[at] for at, code in enumerate(parts))


def judged(cls: type[Algorithm]) -> str:
    """When the accuracy is taken."""
    if cls.evaluate_on == "after_training":
        return "after local training"
    return "after aggregation" + (
        ", on a copy tuned first" if cls.personalize is not Algorithm.personalize else ""
    )


def targets(algorithm: Algorithm) -> str:
    """Which targets, and so which ``model.loss``, the method works with."""
    if algorithm.needs_class_labels:
        return "classes: a class of each sample, so `model.loss: cross_entropy`"
    return "any `model.loss`"


def mean(algorithm: Algorithm, model: Model) -> str:
    """How clients, present and absent, count in the mean."""
    first = algorithm.init(model, rng(1, "init"))
    transport = algorithm.transport(0, 1)
    upload = transport.untrained_upload(first, first.shared)
    term = transport.untrained_term(first, first.shared)
    mixes = upload.mix is not None
    if upload.mix and upload.mix.over_topology:
        return "none; a mix is over a client's neighbours in the round"
    if not upload.message:
        return "none; a mix is over the clients of the round" if mixes else "none"
    settable = {field.name for field in fields(algorithm)}

    def setting(key):
        return f"`{key}: {getattr(algorithm, key)}`" + ("" if key in settable else ", fixed")

    weight = {"samples": "clients count by their samples", "uniform": "clients count equally"}
    away = {
        "exclude": "absent clients do not count",
        "stale": "absent clients count with the last shared values",
    }
    counted = f"{weight[algorithm.weights]} ({setting('weights')})"
    if term.weights and term.weights.keys() == term.mean.keys():
        counted = "clients count by weights of their own"
    elif upload.report is not None:
        counted = "clients count by weights that depend on what all of the round report"
    elif term.weights:
        counted += ", some leaves by weights of their own"
    found = f"{counted}; {away[algorithm.absent]} ({setting('absent')})"
    found = f"a sum; {found}" if upload.sum else found
    return found + ("; a mix is over the clients of the round" if mixes else "")


def lines(name: str) -> int:
    """How many lines the method's file has."""
    return len(
        Path(inspect.getfile(algorithms.find_algorithm(name)))
        .read_text(encoding="utf-8")
        .splitlines()
    )


# The page.


def overview(page: str, model: Model) -> Iterator[str]:
    """The table of all methods, in the order of the page's headings."""
    yield "| method | file | paper | shared | bytes up | bytes down | judged | lines |"
    yield "|---|---|---|---|---:|---:|---|---:|"
    for title, name in HEADING.findall(page):
        counted = measured(reference_method(name), model)
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        cells = f"[{title}](#{anchor})", _link(name), text_of(name).short, SAID[name].shared
        cells += (
            f"{counted.up:,}",
            f"{counted.down:,}",
            judged(algorithms.find_algorithm(name)),
            str(lines(name)),
        )
        yield f"| {' | '.join(cells)} |"


def legend(model: Model) -> Iterator[str]:
    """The table of the formulas' letters."""
    yield "| letter | what it counts | here |"
    yield "|---|---|---:|"
    for letter, (number, what) in symbols(model).items():
        yield f"| {letter} | {what} | {number:,} |"


def hooks() -> Iterator[str]:
    """The table of what a method may define, and which methods do."""
    yield "| hook | what it says | defined by |"
    yield "|---|---|---|"
    for hook in HOOKS:
        default = getattr(Algorithm, hook)
        users = [
            name
            for name in algorithms.algorithm_names()
            if getattr(algorithms.find_algorithm(name), hook) is not default
        ]
        who = (
            ", ".join(f"`{name}`" for name in users) if len(users) <= 8 else f"{len(users)} methods"
        )
        arguments = ", ".join(list(inspect.signature(default).parameters)[1:])
        says = _markdown(" ".join(default.__doc__.split())).replace("|", r"\|")
        yield f"| `{hook}({arguments})` | {says} | {who or 'none'} |"


def facts(name: str, model: Model) -> Iterator[str]:
    """What is known of one method."""
    cls, text, said = algorithms.find_algorithm(name), text_of(name), SAID[name]
    algorithm = reference_method(name)
    counted = measured(algorithm, model)

    def equal(kind):
        return f"{getattr(said.bytes, kind).replace(' * ', ' ')} = {getattr(counted, kind):,}"

    def held(words, kind):
        return words if words == "–" else f"{words}: {equal(kind)} bytes"

    yield text.sentence
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| file | {_link(name)}, {lines(name)} lines |"
    yield f"| paper | {text.paper} |"
    yield f"| shared | {said.shared} |"
    yield f"| personal | {held(said.personal, 'personal')} |"
    yield f"| server alone | {held(said.server, 'server')} |"
    yield f"| bytes up | {equal('up') if counted.up else 'none'} |"
    yield f"| bytes down | {equal('down') if counted.down else 'none'} |"
    yield f"| judged | {judged(cls)} |"
    yield f"| mean | {mean(algorithm, model)} |"
    yield f"| targets | {targets(algorithm)} |"
    yield ""
    yield from _settings(cls)
    yield ""
    yield "```text"
    yield text.body
    yield "```"
    yield ""
    yield f"**BatchNorm:** {text.batchnorm}"
    yield ""
    yield f"**Deviations:** {text.deviations}"


def _settings(cls: type[Algorithm]) -> Iterator[str]:
    """The table of the hyper-parameters."""
    settings = method_settings(cls)
    if not settings:
        yield "It has no settings."
        return
    yield "| setting | meaning | unit | allowed | where the default comes from |"
    yield "|---|---|---|---|---|"
    for setting in settings:
        value = setting.default
        shown = value if isinstance(value, str) else json.dumps(value)
        texts = setting.meaning, setting.unit or "–", setting.allowed, setting.source
        cells = (_markdown(text).replace("|", r"\|") for text in texts)
        yield f"| `{setting.name}: {shown}` | {' | '.join(cells)} |"


def _link(name: str) -> str:
    return f"[`{name}.py`]({SOURCE}/{name}.py)"


def made(page: str) -> str:
    """``page`` with its marked places filled anew."""
    model = build(*REFERENCE)

    def filled(mark: re.Match) -> str:
        kind, name = mark.groups()
        parts = {
            "overview": lambda: overview(page, model),
            "symbols": lambda: legend(model),
            "hooks": hooks,
        }
        new = facts(name, model) if name else parts[kind]()
        return "\n".join([f"<!-- {kind} -->", "", *new, "", "<!-- end -->"])

    return MARK.sub(filled, page)


if __name__ == "__main__":
    for page in (PAGE, GUIDE):
        page.write_text(made(page.read_text(encoding="utf-8")), encoding="utf-8")
