"""The real ring: a real Valkey, real sockets, real processes."""
