"""All tables by their names."""

from collections.abc import Sequence

from .. import algorithms
from ..config.blocks import nearest
from . import agnews_row as agnews
from . import fedhl_table as fedhl
from . import fedlora_tables as fedlora
from . import pfedlora_table as pfedlora
from .grid import Case, Entry, Scale

TABLES = fedlora.TABLES | agnews.TABLES | pfedlora.TABLES | fedhl.TABLES


def entries(name: str, case: Case, scale: Scale, methods: Sequence[str] = ()) -> list[Entry]:
    """The cells of a table, or those that ``methods`` names, in its order.

    Raises ValueError for a name that is none of them, nor, where the table is open to all, an
    algorithm.
    """
    table = TABLES[name]
    found = {entry.key: entry for entry in table.entries(case, scale)}
    known = [*found, *(algorithms.names() if table.open_to_all else ())]
    for method in methods:
        if method not in known:
            what = f"{name} has {', '.join(dict.fromkeys(known))}"
            raise ValueError(f"--methods = {method}: {what}{nearest(method, known)}")
    part = next(iter(found.values())).participation
    own = [Entry(m, m, {"name": m}, participation=part) for m in methods if m not in found]
    return [entry for entry in found.values() if not methods or entry.key in methods] + own
