"""The splits: official counts and draws, disjointness, coverage, and what is said when samples run
out.
"""

import numpy as np
import pytest
from numpy.random import RandomState

from fedlora_mpi.data.apportion import apportion, ensure_minimum
from fedlora_mpi.data.partition import (
    PARTITIONS,
    DirichletClass,
    DirichletClient,
    Iid,
    Pathological,
    Quantity,
    SamplePools,
    Shares,
)

CLASSES = 10
train_y = np.arange(6000) % CLASSES  # labels of 600 samples per class
test_y = np.arange(1500) % CLASSES
SMALL = {"clients": 7, "train": 60, "test": 15}
DRAWN = [name for name in PARTITIONS if name != "given"]


def flat(held):
    return np.concatenate(held)


def wanted(kind, classes, each_class):
    """Counts [N, classes] that the kind asks for, without drawing samples."""
    sides = [
        SamplePools(n, [np.arange(each_class)] * classes, getattr(kind, n), False)
        for n in ("train", "test")
    ]
    entries = np.array(list(kind.allocations(RandomState(kind.seed), *sides)))
    return entries[:, 2].reshape(-1, classes), entries[:, 3].reshape(-1, classes)


@pytest.mark.parametrize("seed", range(3))
def test_dirichlet_client_counts_follow_the_official_rule(seed):
    split = DirichletClient(**SMALL, seed=seed, alpha=0.3).split(train_y, test_y, CLASSES)
    mixes = RandomState(seed).dirichlet([0.3] * CLASSES, 7)
    for q, n, m in zip(mixes, split.train_counts, split.test_counts, strict=True):
        for total, counts in ((60, n), (15, m)):
            left = total
            for share, count in zip(q, counts, strict=True):
                assert count == min(int(total * share + 0.5), left)
                left -= count


@pytest.mark.parametrize("test_each, repeats", [(15, False), (200, True)])
def test_dirichlet_client_draws_in_the_official_order(test_each, repeats):
    kind = DirichletClient(clients=3, train=60, test=test_each, seed=5, alpha=0.5)
    split = kind.split(train_y, test_y, CLASSES)
    rng = RandomState(5)
    rng.dirichlet([0.5] * CLASSES, 3)
    for k in range(3):
        train, test = [], []
        for c in range(CLASSES):  # the stream alternates: training draw, test draw, next class
            train += list(
                rng.choice(np.flatnonzero(train_y == c), split.train_counts[k, c], replace=False)
            )
            test += list(
                rng.choice(np.flatnonzero(test_y == c), split.test_counts[k, c], replace=repeats)
            )
        assert list(split.train[k]) == train and list(split.test[k]) == test


@pytest.mark.parametrize(
    "classes, fewest, mean, fewest_test",
    [(10, 497, 499.6, 97), (100, 489, 498, 86), (200, 482, 495, 75)],
)
def test_dirichlet_client_totals_have_the_published_statistics(classes, fewest, mean, fewest_test):
    kinds = [
        DirichletClient(seed=seed, alpha=alpha) for seed in range(20) for alpha in (0.1, 0.5, 1.0)
    ]
    counts = [wanted(kind, classes, 500) for kind in kinds]
    train, test = (np.concatenate(side).sum(axis=1) for side in zip(*counts, strict=True))
    assert train.min() == fewest and abs(train.mean() - mean) < 0.5 and train.max() == 500
    assert test.min() == fewest_test and test.max() == 100


def test_pathological_draws_in_the_official_order():
    split = Pathological(**SMALL, seed=3, classes_per_client=4).split(train_y, test_y, CLASSES)
    rng = RandomState(3)
    for k in range(7):
        train, test = [], []
        for c in rng.choice(CLASSES, 4, replace=False):
            train += list(rng.choice(np.flatnonzero(train_y == c), 15, replace=False))
            test += list(rng.choice(np.flatnonzero(test_y == c), 3, replace=False))
        assert list(split.train[k]) == train and list(split.test[k]) == test


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", DRAWN)
def test_every_kind_gives_every_client_valid_samples_once(name, overlap):
    split = PARTITIONS[name](**SMALL, overlap=overlap).split(train_y, test_y, CLASSES)
    for y, held, counts in (
        (train_y, split.train, split.train_counts),
        (test_y, split.test, split.test_counts),
    ):
        assert len(held) == 7 and counts.shape == (7, CLASSES)
        for rows, count in zip(held, counts, strict=True):
            assert rows.dtype == np.int64 and len(rows) >= 1
            assert len(set(rows)) == len(rows)
            assert np.array_equal(np.bincount(y[rows], minlength=CLASSES), count)
        if not overlap:
            assert len(set(flat(held))) == len(flat(held))


@pytest.mark.parametrize("name", DRAWN)
def test_the_seed_decides_the_split(name):
    one, same, other = (
        PARTITIONS[name](**SMALL, seed=s).split(train_y, test_y, CLASSES).digest()
        for s in (1, 1, 2)
    )
    assert one == same != other


def test_the_digest_sees_where_one_client_ends():
    def split(*sizes):
        return Iid(clients=2, train=0, test=0).split(
            np.zeros(sizes[0], int), np.zeros(sizes[1], int), 1
        )

    a = split(4, 4)
    b = type(a)(
        (a.train[0][:1], np.append(a.train[0][1:], a.train[1])),
        a.test,
        a.train_counts,
        a.test_counts,
    )
    assert np.array_equal(flat(a.train), flat(b.train)) and a.digest() != b.digest()


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_all_samples_cannot_be_held_back(value):
    with pytest.raises(ValueError, match=f"^validation = {value}: must be"):
        Shares(validation=value)


@pytest.mark.parametrize("name", ["iid", "quantity", "dirichlet_class"])
def test_zero_means_all_samples(name):
    split = PARTITIONS[name](clients=5, train=0, test=0).split(train_y, test_y, CLASSES)
    assert sorted(flat(split.train)) == list(range(6000)) and sorted(flat(split.test)) == list(
        range(1500)
    )


def test_pathological_without_overlap_can_deal_everything():
    split = Pathological(clients=5, train=0, test=0, overlap=False, classes_per_client=2).split(
        train_y, test_y, CLASSES
    )
    assert sorted(flat(split.train)) == list(range(6000))
    assert ((split.train_counts > 0).sum(axis=1) == 2).all()
    assert np.array_equal(split.train_counts > 0, split.test_counts > 0)


@pytest.mark.parametrize("name", ["dirichlet_client", "dirichlet_class"])
def test_test_samples_have_the_label_mix_of_the_training_samples(name):
    split = PARTITIONS[name](clients=7, train=400, test=100, overlap=True, alpha=1).split(
        train_y, test_y, CLASSES
    )
    train, test = (
        c / c.sum(axis=1, keepdims=True) for c in (split.train_counts, split.test_counts)
    )
    assert abs(train - test).max() < 0.03


def test_dirichlet_mixes_are_the_same_with_and_without_overlap():
    a, b = (
        DirichletClient(**SMALL, overlap=o).split(train_y, test_y, CLASSES).train_counts
        for o in (False, True)
    )
    assert np.array_equal(a, b)


def test_dirichlet_class_ends_where_drawing_again_would_not():
    split = DirichletClass(clients=100, alpha=0.01, minimum=12).split(train_y, test_y, CLASSES)
    assert split.train_counts.sum(axis=1).min() == 12 and split.test_counts.sum(axis=1).min() == 1
    assert split.train_counts.sum() == 6000
    # nobody is tested on what it never saw
    held = (split.train_counts > 0) | (split.test_counts == 0)
    assert held.all()


def test_dirichlet_class_thins_a_client_in_proportion():
    full, thin = (
        DirichletClass(clients=4, alpha=1, train=n).split(train_y, test_y, CLASSES)
        for n in (0, 200)
    )
    assert (full.train_counts.sum(axis=1) > 200).all() and (
        thin.train_counts.sum(axis=1) == 200
    ).all()
    exact = 200 * full.train_counts / full.train_counts.sum(axis=1, keepdims=True)
    assert abs(thin.train_counts - exact).max() < 1


def test_quantity_changes_sizes_and_not_labels():
    split = Quantity(clients=5, train=1000, test=100, alpha=1).split(train_y, test_y, CLASSES)
    sizes = split.train_counts.sum(axis=1)
    assert sizes.sum() == 5000 and sizes.max() > 2 * sizes.min()
    assert abs(split.train_counts / sizes[:, None] - 0.1)[sizes > 500].max() < 0.05


# --- shares: the split of pFedLoRA's authors


def shares(clients, seed=1, classes=10, **fields):
    """The split of a data set of the size of CIFAR-10 or CIFAR-100."""
    return Shares(clients=clients, seed=seed, **fields).split(
        np.arange(50_000) % classes, np.arange(10_000) % classes, classes
    )


@pytest.mark.parametrize("seed", range(1, 21))
def test_shares_of_ten_clients_are_about_four_thousand_samples(seed):
    split = shares(10, seed)
    sizes = np.array([len(rows) for rows in split.train])
    assert 3990 <= sizes.mean() <= 4000  # 40,000 less what int() cuts
    # two classes of 4,000, 0.4 to 0.6 of each
    assert sizes.min() >= 3200 * 0.97 and sizes.max() <= 4800 * 1.03
    # the fifth is drawn from all
    assert [len(rows) for rows in split.test] == pytest.approx(sizes / 4, rel=0.03)


def test_shares_of_ten_clients_spread_as_published():
    sizes = np.array([len(rows) for seed in range(1, 21) for rows in shares(10, seed).train])
    assert ((sizes >= 3580) & (sizes <= 4600)).mean() > 0.95 and 150 < sizes.std() < 250


@pytest.mark.parametrize("clients, size", [(50, 799), (100, 399)])
def test_shares_of_more_clients_have_the_published_mean(clients, size):
    sizes = np.array([len(rows) for seed in (1, 2, 3) for rows in shares(clients, seed).train])
    assert abs(sizes.mean() - size) < 1


@pytest.mark.parametrize(
    "clients, classes, each", [(10, 10, 2), (50, 10, 2), (10, 100, 10), (7, 10, 3), (3, 10, 9)]
)
def test_shares_are_disjoint_classes_of_one_mix_in_training_and_test(clients, classes, each):
    split = shares(clients, 3, classes, classes_per_client=each, validation=0.0)
    held = split.train_counts > 0
    assert (held.sum(axis=1) == each).all() and np.array_equal(held, split.test_counts > 0)
    assert (held.sum(axis=0) <= -(-each * clients // classes)).all()
    for rows in (split.train, split.test):
        assert len(set(flat(rows))) == len(flat(rows))
    # int(n_c p) of both: the proportions are the same up to what int() cuts
    train, test = split.train_counts / (50_000 / classes), split.test_counts / (10_000 / classes)
    assert abs(train - test).max() <= 1 / (10_000 / classes)
    if each * clients % classes == 0:
        assert (held.sum(axis=0) == each * clients // classes).all()
        assert split.train_counts.sum(axis=0).min() > 50_000 / classes - clients
        for counts in split.train_counts.T:
            mine = counts[counts > 0]
            assert mine.max() / mine.min() <= 0.6 / 0.4 * 1.02  # U(0.4, 0.6), normalised


def test_shares_hold_back_the_same_fifth_of_the_training_samples_from_all_clients():
    # Of CIFAR-100 with ten clients every class has one holder, who has all of it that is not held
    # back.
    split = shares(10, classes=100, classes_per_client=10)
    assert len(flat(split.train)) == 40_000 and len(flat(split.test)) == 10_000
    whole = shares(10, classes=100, classes_per_client=10, validation=0.0)
    assert len(flat(whole.train)) == 50_000
    held_back = set(range(50_000)) - set(flat(split.train))
    classes = np.bincount(np.array(sorted(held_back)) % 100)
    assert len(set(classes)) > 5  # of all samples, not of each class
    half = shares(10, classes=100, classes_per_client=10, validation=0.5)
    assert len(flat(half.train)) == 25_000 and set(flat(half.train)) < set(flat(split.train))


def test_train_and_test_limit_shares_in_proportion():
    full, thin = shares(10), shares(10, train=200, test=50)
    assert (thin.train_counts.sum(axis=1) == 200).all() and (
        thin.test_counts.sum(axis=1) == 50
    ).all()
    exact = 200 * full.train_counts / full.train_counts.sum(axis=1, keepdims=True)
    assert abs(thin.train_counts - exact).max() < 1


@pytest.mark.parametrize("each", range(1, CLASSES + 1))
def test_shares_give_every_client_its_number_of_classes_whatever_the_number_of_clients(each):
    for clients in range(1, 50):
        split = Shares(clients=clients, classes_per_client=each, seed=clients).split(
            train_y, test_y, CLASSES
        )
        held = split.train_counts > 0
        assert (held.sum(axis=1) == each).all() and np.ptp(held.sum(axis=0)) == (
            each * clients % CLASSES > 0
        )


def test_shares_draw_in_the_official_order():
    rng, split = RandomState(4), shares(10, 4, validation=0.0)
    proportions = [rng.uniform(0.4, 0.6, 2) for _ in range(10)]
    proportions = [list(p / p.sum()) for p in proportions]
    left = np.full(10, 2)
    for counts in split.train_counts:
        expected = np.zeros(10, int)
        for _ in range(2):
            c = rng.choice(np.flatnonzero(left == left.max()))
            left[c] -= 1
            expected[c] = int(5000 * proportions[c].pop())
        assert np.array_equal(counts, expected)


def test_apportioned_numbers_add_up():
    assert list(apportion(10, np.array([1.0, 1.0, 1.0]))) == [4, 3, 3]
    assert list(apportion(7, np.array([0.0, 0.5, 0.25]))) == [0, 5, 2]


def test_who_gives_keeps_the_minimum():
    # the first has just enough of the pool that the second likes best
    counts = np.array([[2, 0], [0, 0], [0, 4]])
    assert ensure_minimum(counts, 2, np.array([[1.0, 0.0]] * 3)).tolist() == [
        [2, 0],
        [0, 2],
        [0, 2],
    ]


def test_topping_up_takes_the_best_liked_class_from_its_largest_holder():
    counts = np.array([[9, 5], [2, 7], [0, 0]])
    moved = ensure_minimum(counts, 2, np.array([[0, 0], [0, 0], [0.1, 0.9]]))
    assert moved.tolist() == [[9, 5], [2, 5], [0, 2]] and counts[2].sum() == 0


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("alpha", -1, "a number above 0"),
        ("alpha", float("nan"), "a number above 0"),
        ("clients", 0, "an integer from 1 to 10000000"),
        ("train", -1, "an integer of at least 0"),
        ("test", -1, "an integer of at least 0"),
        ("seed", 2**32, "an integer from 0 to 4294967295"),
    ],
)
def test_impossible_fields_are_refused(field, value, allowed):
    with pytest.raises(ValueError, match=f"^{field} = {value}: must be {allowed}$"):
        DirichletClient(**{field: value})


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            DirichletClient(train=5000, clients=2, alpha=0.1),
            r"train = 5000: client \d wants \d+ train samples of class \d",
        ),
        (
            DirichletClient(train=900, overlap=False),
            r"left; lower train or clients, or set overlap to true",
        ),
        (
            DirichletClient(train=1, alpha=100),
            r"train = 1: \d+ of 40 clients .* would hold no train sample",
        ),
        (DirichletClient(alpha=1e-5), r"alpha = 1e-05: a Dirichlet draw underflowed"),
        (
            DirichletClass(clients=700),
            r"clients = 700: at least 10 samples for each are 7000, and there are 6000",
        ),
        (
            DirichletClass(clients=1600, minimum=1),
            r"clients = 1600: at least 1 samples for each are 1600, and there",
        ),
        (
            Quantity(train=200, test=10),
            r"train = 200: client \d+ wants \d+ train samples, and there are \d+ left",
        ),
        (
            Iid(train=50, test=40),
            r"test = 40: client 37 wants 40 test samples, and there are 20 left; lower test or clients",
        ),
        (
            Pathological(classes_per_client=11),
            r"classes_per_client = 11: the data set has 10 classes",
        ),
        (Shares(classes_per_client=11), r"classes_per_client = 11: the data set has 10 classes"),
        (
            Shares(clients=4000),
            r"train = 0: \d+ of 4000 clients .* would hold no train sample; lower clients",
        ),
        (
            Pathological(classes_per_client=10, test=9),
            r"test = 9: 40 of 40 clients .* would hold no test sample",
        ),
    ],
)
def test_what_cannot_be_met_names_the_key_and_the_numbers(kind, message):
    with pytest.raises(ValueError, match=f"^data.partition.*{message}"):
        kind.split(train_y, test_y, CLASSES)
