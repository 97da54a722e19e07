"""Import of torchvision, also with a CPU-only torch."""

import sys
from importlib.util import find_spec
from types import ModuleType

_libraries: list[object] = []  # keeps each Library alive, and so its definitions


def import_torchvision() -> ModuleType:
    """The module torchvision.

    Its wheel expects a torch with CUDA operators. With a CPU-only torch the import fails because
    the schemas of two operators are missing, so this function declares them first. Data sets,
    transforms and models use neither operator.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        from torch.library import Library

        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import left behind
        library = Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        import torchvision
    return torchvision


def repair_torchvision() -> None:
    """Make ``import torchvision`` work in users' code, if it is installed and can work at all."""
    if "torchvision" not in sys.modules and find_spec("torchvision"):
        try:
            import_torchvision()
        except Exception:  # code that needs torchvision gets the error from its own import
            return
