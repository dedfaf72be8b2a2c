"""Transports: how bytes reach clients (TCP, ASGI, Server-Sent Events)."""
