"""Hooks of earlier versions of the contract, and what replaces them.

A user's class with one of them would be silently wrong, so it is refused when it is defined.
"""

_LOCAL = "local(model, train, round_) returns Phase and Visit in order of time"
_UPLOAD = "upload(start, end, round_) returns Upload(mean=..., sum=..., mix=..., ...)"
_UPDATE = "server_update(server, shared, aggregate, svd) returns Update(shared, server, metrics)"
_TRANSPORT = "transport(client, clients) returns Transport(method, download, expand, ...)"
FORMER_HOOKS = {  # a hook or class variable of before: what replaces it
    "begin": f"a Visit before the first Phase: {_LOCAL}",
    "phases": _LOCAL,
    "finish": f"a Visit after the last Phase: {_LOCAL}",
    "needs_all_data": f"Visit(apply, all_data=True): {_LOCAL}",
    "surveys": f"Visit(apply, all_data=True): {_LOCAL}",
    "offer": _UPLOAD,
    "sums": _UPLOAD,
    "upload_numel": _UPLOAD,
    "sent": _UPLOAD,
    "center_keys": f"Mix(..., centered=True): {_UPLOAD}",
    "centred": f"Mix(..., centered=True): {_UPLOAD}",
    "serve": _UPDATE,
    "decomposed": f"the argument svd: {_UPDATE}",
    "handed_out": f"the argument svd: {_UPDATE}",
    "server_metrics": _UPDATE,
    "told": _UPDATE,
    "for_client": _TRANSPORT,
    "of_client": _TRANSPORT,
    "download": _TRANSPORT,
    "expand": _TRANSPORT,
    "download_numel": _TRANSPORT,
    "received": _TRANSPORT,
    "used": "nothing: the engine counts the samples that a phase uses",
    "low_rank": "nothing: the ranks follow from the factors that init returns",
    "tune": "personalize(model, train, round_)",
    "weights_of": "client_model(model, v)",
    "evaluates": "evaluate_on",
    "judges": "evaluate_on",
}

# these were plain values; a field of any other former name is a hyper-parameter
FORMER_FLAGS = (
    "needs_all_data",
    "surveys",
    "sums",
    "center_keys",
    "centred",
    "evaluates",
    "judges",
)


def refuse_former_hooks(cls: type, page: str) -> None:
    """Raise TypeError if a method's class has a former hook; ``page``: where the hooks are."""
    for former, replacement in FORMER_HOOKS.items():
        value = getattr(cls, former, None)
        if former in FORMER_FLAGS and hasattr(cls, former) or callable(value):
            raise TypeError(f"{cls.__name__}.{former}: replaced by {replacement}; {page}")
