"""Decides: no I/O, no Trio, no clock (time is an argument)."""
