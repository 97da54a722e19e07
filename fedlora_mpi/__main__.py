"""``python -m fedlora_mpi`` is ``fedlora-mpi``."""

import sys

from .cli import main

sys.exit(main())
