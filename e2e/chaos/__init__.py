"""What takes minutes: Redis and the gateway are killed again and again. Run by ``nox -s chaos``."""
