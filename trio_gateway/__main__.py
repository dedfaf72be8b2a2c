"""``python -m trio_gateway``: the command line."""

from .cli import main

main(prog_name="trio-gateway")
