"""Labels that may be one class by mistake: alike but for case, blanks, zeros before a number, or forms of Unicode."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable


def alike(labels: Iterable[str]) -> list[list[str]]:
    """The groups of different labels that a reader might take for one, each sorted."""
    groups = defaultdict(set)
    for label in labels:
        groups[_plain(label)].add(label)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def hint_of_alike(where: str, labels: Iterable[str]) -> tuple[str, ...]:
    """A line about such groups, none where there are none; ``where``: the key and what it says."""
    found = [" and ".join(map(repr, group)) for group in alike(labels)]
    if not found:
        return ()
    more = f", and {len(found) - 3} more such groups" if len(found) > 3 else ""
    listed = "; ".join(found[:3])
    return (f"{where}: {listed}{more} are different classes; write them alike where they are one",)


def _plain(label: str) -> str:
    """What is left of a label without case, blanks, invisible characters and ways to write a number."""
    text = unicodedata.normalize("NFKC", label).casefold()
    text = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) not in ("Cf", "Cc"))
    text = text.strip()
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", text):
        return repr(float(text))
    return re.sub(r"[\s_-]+", " ", text)
