"""Find labels that may mean the same class.

Such labels differ only in case, blanks, leading zeros or Unicode form.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable


def similar_labels(labels: Iterable[str]) -> list[list[str]]:
    """Return the groups of different labels that look alike, each sorted."""
    groups = defaultdict(set)
    for label in labels:
        groups[_normalize_label(label)].add(label)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def similar_label_hints(setting: str, labels: Iterable[str]) -> tuple[str, ...]:
    """Return one hint that names up to three groups of similar labels, or an empty tuple.

    ``setting`` is the config key with its value: "key = value".
    """
    groups = [" and ".join(map(repr, group)) for group in similar_labels(labels)]
    if not groups:
        return ()
    remainder = f", and {len(groups) - 3} more such groups" if len(groups) > 3 else ""
    listed = "; ".join(groups[:3])
    return (
        f"{setting}: {listed}{remainder} are different classes; write them alike where they are "
        "one",
    )


def _normalize_label(label: str) -> str:
    """Return the form of a label that similar labels share.

    It ignores case, blanks, invisible characters and the notation of numbers.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).casefold())
    text = re.sub(r"\s", " ", text)
    visible = (c for c in text if unicodedata.category(c) not in ("Cf", "Cc"))
    text = "".join(visible).strip()
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", text):
        return repr(float(text))
    return re.sub(r"[\s_-]+", " ", text)
