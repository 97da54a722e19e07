"""Feature vectors of a data set without a network: principal components of images, latent semantic
components of texts. They are written to an npz file, which a run reads as ``data.dataset: npz``.
"""

import io
from pathlib import Path

import numpy as np
from torch import Tensor

from ..core.extras import extra_imports
from ..data.datasets import Data, load
from ..data.source import Source
from ..store import nolinks
from ..store.files import write_atomic

WIDTH = 256  # features of a sample


def write_features(source: Source, to: Path, root: Path) -> None:
    """Write the features of the data set ``source`` to the npz file ``to``, a path under ``root``.

    Images: the first principal components of the pixels of the training images (PCA). Texts: the
    first components of the truncated SVD of tf-idf weighted word counts (latent semantic analysis),
    minus their mean. The components keep their relative sizes; one factor gives all of them
    together the standard deviation 1. Deterministic. Raises ValueError for data that are neither.
    """
    need_sklearn("features")
    data = load(source)
    if not (data.has_images or data.tokens):
        raise ValueError(f"data = {source.dataset}: features are made of images and texts alone")
    reduce = _latent_semantics if data.tokens else _principal_components
    train, test = reduce(data)
    mean = train.mean(0)
    scale = (train - mean).std()
    arrays = {
        "x_train": ((train - mean) / scale).astype(np.float32),
        "y_train": data.train.y.numpy(),
        "x_test": ((test - mean) / scale).astype(np.float32),
        "y_test": data.test.y.numpy(),
        "mean": np.zeros(1, np.float32),  # they are normalised already
        "std": np.ones(1, np.float32),
    }
    file = io.BytesIO()
    np.savez(file, **arrays)
    with nolinks.open_folder(to.parent, root, create=True):
        write_atomic(to, file.getvalue(), root)


def need_sklearn(what: str) -> None:
    """Raise ValueError if scikit-learn is not installed, which makes ``what``."""
    with extra_imports("sklearn", "digits", what):
        import sklearn  # noqa: F401


def _principal_components(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """[M, WIDTH] and [M', WIDTH]: the features of the training and of the test images."""
    from sklearn.decomposition import PCA

    def pixels(x: Tensor) -> np.ndarray:
        return x.flatten(1).numpy().astype(np.float32) / 255

    pca = PCA(WIDTH, svd_solver="covariance_eigh")
    return pca.fit_transform(pixels(data.train.x)), pca.transform(pixels(data.test.x))


def _latent_semantics(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """[M, WIDTH] and [M', WIDTH]: the features of the training and of the test texts."""
    from scipy.sparse import csr_matrix
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer

    def counts(x: Tensor) -> csr_matrix:
        words = x.numpy().astype(np.int64)
        is_word = words != data.padding
        texts = np.nonzero(is_word)[0]
        ones = np.ones(len(texts), np.float32)
        return csr_matrix((ones, (texts, words[is_word])), shape=(len(words), data.tokens))

    tfidf = TfidfTransformer(sublinear_tf=True)
    train, test = tfidf.fit_transform(counts(data.train.x)), tfidf.transform(counts(data.test.x))
    svd = TruncatedSVD(WIDTH, random_state=0)
    return svd.fit_transform(train), svd.transform(test)
