"""The configs that come with the package."""

from functools import cache
from pathlib import Path


@cache
def packaged_configs() -> dict[str, Path]:
    """The configs that come with the package: name -> file, by name."""
    package = Path(__file__).parents[1]
    # a wheel has them in the package, a clone beside it
    folders = [f for f in (package / "configs", package.parent / "configs") if f.is_dir()]
    return {file.stem: file for folder in folders[:1] for file in sorted(folder.glob("*.yaml"))}


def find_config(name: str | Path) -> Path:
    """The file of a config: ``name``, or the config of the package that has this name.

    A file of the working folder comes first. A name of the package has no suffix.
    """
    path = Path(name)
    return path if path.exists() else packaged_configs().get(str(name), path)
