"""Touches the world: sockets, HTTP, Redis."""
