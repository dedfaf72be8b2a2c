"""Broker: what is read from Redis and written to it."""
