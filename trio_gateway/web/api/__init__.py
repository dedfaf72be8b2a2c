"""The API for backends: publish, control and read over HTTP, with a key."""
