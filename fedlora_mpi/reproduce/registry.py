"""All tables by name."""

from collections.abc import Sequence

from .. import algorithms
from ..config.blocks import suggest
from . import agnews_row as agnews
from . import fedhl_shift_table as shift
from . import fedhl_table as fedhl
from . import fedhl_text_table as text
from . import fedlora_tables as fedlora
from . import neighbours_table as neighbours
from . import pfedlora_table as pfedlora
from .grid import Case, Entry, Scale

TABLES = (
    fedlora.TABLES
    | agnews.TABLES
    | pfedlora.TABLES
    | fedhl.TABLES
    | shift.TABLES
    | text.TABLES
    | neighbours.TABLES
)


def table_entries(name: str, case: Case, scale: Scale, methods: Sequence[str] = ()) -> list[Entry]:
    """The cells of a table, or only those that ``methods`` names, in the table's order.

    If the table allows other methods, ``methods`` may also name any algorithm, which means all of
    its cells. Raises ValueError for an unknown name.
    """
    table = TABLES[name]
    entry_of = {entry.key: entry for entry in table.entries(case, scale)}
    known = [*entry_of, *(algorithms.algorithm_names() if table.allows_other_methods else ())]
    for method in methods:
        if method not in known:
            allowed = f"{name} has {', '.join(dict.fromkeys(known))}"
            raise ValueError(f"--methods = {method}: {allowed}{suggest(method, known)}")
    participation = next(iter(entry_of.values())).participation
    names_of = {  # what names a cell
        key: {key, entry.algorithm["name"]} if table.allows_other_methods else {key}
        for key, entry in entry_of.items()
    }
    extra = [
        Entry(m, m, {"name": m}, participation=participation)
        for m in methods
        if not any(m in names for names in names_of.values())
    ]
    return [e for k, e in entry_of.items() if not methods or names_of[k] & set(methods)] + extra
