"""Found by Python at the start of each process that has this folder in its PYTHONPATH."""

from e2e.chaos import faults

faults.install()
