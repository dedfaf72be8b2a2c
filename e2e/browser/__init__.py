"""The console in a real headless Chromium: run by ``nox -s browser``."""
