"""The samples in `deploy/`, with the real programs: run by ``nox -s deploy``."""
