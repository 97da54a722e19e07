"""Labels that may be one class by mistake: alike but for case, blanks, leading zeros or Unicode."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable


def similar_labels(labels: Iterable[str]) -> list[list[str]]:
    """The groups of different labels that a reader might take for one, each sorted."""
    groups = defaultdict(set)
    for label in labels:
        groups[_normalize_label(label)].add(label)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def similar_label_hints(setting: str, labels: Iterable[str]) -> tuple[str, ...]:
    """A line for each group of similar labels; ``setting``: the key and its value."""
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
    """A label without case, blanks, invisible characters and ways to write a number."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).casefold())
    text = re.sub(r"\s", " ", text)
    visible = (c for c in text if unicodedata.category(c) not in ("Cf", "Cc"))
    text = "".join(visible).strip()
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", text):
        return repr(float(text))
    return re.sub(r"[\s_-]+", " ", text)
