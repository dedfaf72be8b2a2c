"""Web: the HTTP routes."""
