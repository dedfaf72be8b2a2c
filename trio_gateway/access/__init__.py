"""Access: who a client is, and whether it may connect."""
