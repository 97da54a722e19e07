"""``python -m fedlora_mpi`` is ``fedlora-mpi``: Python puts the working folder first, where no
library may come from.
"""

import os
import sys

if sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from .cli import main

sys.exit(main())
