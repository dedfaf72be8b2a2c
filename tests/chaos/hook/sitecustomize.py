"""Found by Python at the start of each process that has this folder in its PYTHONPATH."""

from chaos import faults

faults.install()
