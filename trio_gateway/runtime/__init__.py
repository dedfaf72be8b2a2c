"""Runs: nurseries, channels, cancel scopes; no network library."""
