"""`octavo bench serve`: load that does not wait for the server, and what the server made of it."""
