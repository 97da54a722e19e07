"""``mpirun -n 3 python several.py CODES '[["run", ...], ...]'``: commands one after another in one
launch.

Starting Python and MPI costs more than a tiny run. Each rank writes its exit codes to CODES-<rank>.
"""

import json
import sys

from mpi4py import MPI

from fedlora_mpi.cli import main

exit_codes = []
for line in json.loads(sys.argv[2]):
    exit_codes.append(main(line))
    with open(f"{sys.argv[1]}-{MPI.COMM_WORLD.rank}", "w") as file:
        json.dump(exit_codes, file)
sys.exit(exit_codes[-1])
