"""``python -m fedlora_mpi`` is ``fedlora-mpi``.

Python puts the working folder first on its path. It is removed, so that no library is imported from
there.
"""

import os
import sys

if sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from .cli import main

sys.exit(main())
