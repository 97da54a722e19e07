"""The splits: official counts and draws, disjointness, coverage, and what is said when samples run out."""

import numpy as np
import pytest
from numpy.random import RandomState

from fedlora_mpi.data.apportion import apportioned, topped_up
from fedlora_mpi.data.partition import KINDS, DirichletClass, DirichletClient, Iid, Pathological, Quantity, Side

CLASSES = 10
train_y = np.arange(6000) % CLASSES  # labels of 600 samples per class
test_y = np.arange(1500) % CLASSES
SMALL = {"clients": 7, "train": 60, "test": 15}


def flat(held):
    return np.concatenate(held)


def wanted(kind, classes, each_class):
    """Counts [N, classes] that the kind asks for, without drawing samples."""
    sides = [Side(n, [np.arange(each_class)] * classes, getattr(kind, n), False) for n in ("train", "test")]
    entries = np.array(list(kind.wants(RandomState(kind.seed), *sides)))
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
            train += list(rng.choice(np.flatnonzero(train_y == c), split.train_counts[k, c], replace=False))
            test += list(rng.choice(np.flatnonzero(test_y == c), split.test_counts[k, c], replace=repeats))
        assert list(split.train[k]) == train and list(split.test[k]) == test


@pytest.mark.parametrize(
    "classes, fewest, mean, fewest_test", [(10, 497, 499.6, 97), (100, 489, 498, 86), (200, 482, 495, 75)]
)
def test_dirichlet_client_totals_have_the_published_statistics(classes, fewest, mean, fewest_test):
    kinds = [DirichletClient(seed=seed, alpha=alpha) for seed in range(20) for alpha in (0.1, 0.5, 1.0)]
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
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_every_client_valid_samples_once(name, overlap):
    split = KINDS[name](**SMALL, overlap=overlap).split(train_y, test_y, CLASSES)
    for y, held, counts in ((train_y, split.train, split.train_counts), (test_y, split.test, split.test_counts)):
        assert len(held) == 7 and counts.shape == (7, CLASSES)
        for rows, count in zip(held, counts, strict=True):
            assert rows.dtype == np.int64 and len(rows) >= 1
            assert len(set(rows)) == len(rows)
            assert np.array_equal(np.bincount(y[rows], minlength=CLASSES), count)
        if not overlap:
            assert len(set(flat(held))) == len(flat(held))


@pytest.mark.parametrize("name", KINDS)
def test_the_seed_decides_the_split(name):
    one, same, other = (KINDS[name](**SMALL, seed=s).split(train_y, test_y, CLASSES).digest() for s in (1, 1, 2))
    assert one == same != other


def test_the_digest_sees_where_one_client_ends():
    def split(*sizes):
        return Iid(clients=2, train=0, test=0).split(np.zeros(sizes[0], int), np.zeros(sizes[1], int), 1)

    a = split(4, 4)
    b = type(a)((a.train[0][:1], np.append(a.train[0][1:], a.train[1])), a.test, a.train_counts, a.test_counts)
    assert np.array_equal(flat(a.train), flat(b.train)) and a.digest() != b.digest()


@pytest.mark.parametrize("name", ["iid", "quantity", "dirichlet_class"])
def test_zero_means_all_samples(name):
    split = KINDS[name](clients=5, train=0, test=0).split(train_y, test_y, CLASSES)
    assert sorted(flat(split.train)) == list(range(6000)) and sorted(flat(split.test)) == list(range(1500))


def test_pathological_without_overlap_can_deal_everything():
    split = Pathological(clients=5, train=0, test=0, overlap=False, classes_per_client=2).split(
        train_y, test_y, CLASSES
    )
    assert sorted(flat(split.train)) == list(range(6000))
    assert ((split.train_counts > 0).sum(axis=1) == 2).all()
    assert np.array_equal(split.train_counts > 0, split.test_counts > 0)


@pytest.mark.parametrize("name", ["dirichlet_client", "dirichlet_class"])
def test_test_samples_have_the_label_mix_of_the_training_samples(name):
    split = KINDS[name](clients=7, train=400, test=100, overlap=True, alpha=1).split(train_y, test_y, CLASSES)
    train, test = (c / c.sum(axis=1, keepdims=True) for c in (split.train_counts, split.test_counts))
    assert abs(train - test).max() < 0.03


def test_dirichlet_mixes_are_the_same_with_and_without_overlap():
    a, b = (DirichletClient(**SMALL, overlap=o).split(train_y, test_y, CLASSES).train_counts for o in (False, True))
    assert np.array_equal(a, b)


def test_dirichlet_class_ends_where_drawing_again_would_not():
    split = DirichletClass(clients=100, alpha=0.01, minimum=12).split(train_y, test_y, CLASSES)
    assert split.train_counts.sum(axis=1).min() == 12 and split.test_counts.sum(axis=1).min() == 1
    assert split.train_counts.sum() == 6000
    held = (split.train_counts > 0) | (split.test_counts == 0)  # nobody is tested on what it never saw
    assert held.all()


def test_dirichlet_class_thins_a_client_in_proportion():
    full, thin = (DirichletClass(clients=4, alpha=1, train=n).split(train_y, test_y, CLASSES) for n in (0, 200))
    assert (full.train_counts.sum(axis=1) > 200).all() and (thin.train_counts.sum(axis=1) == 200).all()
    exact = 200 * full.train_counts / full.train_counts.sum(axis=1, keepdims=True)
    assert abs(thin.train_counts - exact).max() < 1


def test_quantity_changes_sizes_and_not_labels():
    split = Quantity(clients=5, train=1000, test=100, alpha=1).split(train_y, test_y, CLASSES)
    sizes = split.train_counts.sum(axis=1)
    assert sizes.sum() == 5000 and sizes.max() > 2 * sizes.min()
    assert abs(split.train_counts / sizes[:, None] - 0.1)[sizes > 500].max() < 0.05


def test_apportioned_numbers_add_up():
    assert list(apportioned(10, np.array([1.0, 1.0, 1.0]))) == [4, 3, 3]
    assert list(apportioned(7, np.array([0.0, 0.5, 0.25]))) == [0, 5, 2]


def test_topping_up_takes_the_best_liked_class_from_its_largest_holder():
    counts = np.array([[9, 5], [2, 7], [0, 0]])
    moved = topped_up(counts, 2, np.array([[0, 0], [0, 0], [0.1, 0.9]]))
    assert moved.tolist() == [[9, 5], [2, 5], [0, 2]] and counts[2].sum() == 0


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("alpha", -1, "a number above 0"),
        ("alpha", float("nan"), "a number above 0"),
        ("clients", 0, "an integer of at least 1"),
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
        (DirichletClient(train=900, overlap=False), r"left; lower train or clients, or set overlap to true"),
        (DirichletClient(train=1, alpha=100), r"train = 1: \d+ of 40 clients .* would hold no train sample"),
        (DirichletClient(alpha=1e-5), r"alpha = 1e-05: a Dirichlet draw underflowed"),
        (DirichletClass(clients=700), r"clients = 700: at least 10 samples for each are 7000, and there are 6000"),
        (DirichletClass(clients=1600, minimum=1), r"clients = 1600: at least 1 samples for each are 1600, and there"),
        (Quantity(train=200, test=10), r"train = 200: client \d+ wants \d+ train samples, and there are \d+ left"),
        (
            Iid(train=50, test=40),
            r"test = 40: client 37 wants 40 test samples, and there are 20 left; lower test or clients",
        ),
        (Pathological(classes_per_client=11), r"classes_per_client = 11: the data set has 10 classes"),
        (Pathological(classes_per_client=10, test=9), r"test = 9: 40 of 40 clients .* would hold no test sample"),
    ],
)
def test_what_cannot_be_met_names_the_key_and_the_numbers(kind, message):
    with pytest.raises(ValueError, match=f"^data.partition.*{message}"):
        kind.split(train_y, test_y, CLASSES)
