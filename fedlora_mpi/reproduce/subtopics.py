"""The texts of one class of a data set, with a sub-topic of each, and a tokenizer of the others.

They are written to files that a run reads as ``data.dataset: csv`` and ``data.text.tokenizer``.
"""

import csv
import io
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from ..data.datasets import read_texts
from ..data.samples import LabelledTexts
from ..data.source import Source
from ..data.texts import train_byte_pairs
from ..store import nolinks
from ..store.files import write_atomic
from .features import need_sklearn

SUBTOPIC, TEXT = "subtopic", "text"  # columns of the CSV files
_DIRECTIONS = 50  # of the latent semantic space in which texts are clustered


def write_tokenizer(
    source: Source, classes: Collection[int], tokens: int, to: Path, root: Path
) -> None:
    """Write the tokenizer.json of byte pairs of the training texts of these classes to ``to``, a
    path under ``root``. It has ``tokens`` tokens.
    """
    train = read_texts(source).train
    tokenizer = train_byte_pairs(_texts_of(train, classes), tokens)
    _write(to, tokenizer.encode(), root)


def write_subtopics(
    source: Source, class_: int, count: int, to: Sequence[Path], root: Path
) -> None:
    """Write the training and the test texts of one class, each with one of ``count`` sub-topics, to
    the two CSV files ``to``, paths under ``root``.
    """
    raw = read_texts(source)
    train, test = (_texts_of(side, [class_]) for side in (raw.train, raw.test))
    subtopics_of = find_subtopics(train, test, count)
    for path, texts, subtopics in zip(to, (train, test), subtopics_of, strict=True):
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((SUBTOPIC, TEXT))
        writer.writerows(zip(subtopics.tolist(), texts, strict=True))
        _write(path, file.getvalue().encode(), root)


def find_subtopics(
    train: Sequence[str], test: Sequence[str], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sub-topic of each training and of each test text, from 0 to count - 1. Deterministic.

    k-means finds the centres of the sub-topics among the training texts, in the first directions of
    the truncated SVD of their tf-idf weights, scaled to length 1 (latent semantic analysis). Then
    ``assign_equally`` divides each side. Raises ValueError without scikit-learn.
    """
    need_sklearn("sub-topics")
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    tfidf = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    weights = tfidf.fit_transform(train)
    svd = TruncatedSVD(min(_DIRECTIONS, weights.shape[1] - 1), random_state=0)
    features = normalize(svd.fit_transform(weights))
    kmeans = KMeans(count, n_init=10, random_state=0).fit(features)
    test_features = normalize(svd.transform(tfidf.transform(test)))
    first, second = (kmeans.transform(side) for side in (features, test_features))
    return assign_equally(first), assign_equally(second)


def assign_equally(distances: np.ndarray) -> np.ndarray:
    """The part [M] of each text, given its distances [M, K] to the centres of the parts.

    The pairs of text and centre are gone through from the nearest on; a text goes to the first
    centre whose part has fewer than M / K texts.
    """
    texts, parts = distances.shape
    places = np.full(parts, -(-texts // parts))
    part_of = np.full(texts, -1)
    for pair in np.argsort(distances, axis=None, kind="stable"):
        text, part = divmod(int(pair), parts)
        if part_of[text] < 0 and places[part]:
            part_of[text] = part
            places[part] -= 1
    return part_of


def _texts_of(side: LabelledTexts, classes: Collection[int]) -> list[str]:
    return [text for text, c in zip(side.texts, side.y, strict=True) if c in classes]


def _write(to: Path, content: bytes, root: Path) -> None:
    with nolinks.open_folder(to.parent, root, create=True):
        write_atomic(to, content, root)
