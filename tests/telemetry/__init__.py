"""The edges, on real sockets and in memory; a package, so that it has a conftest of its own."""
