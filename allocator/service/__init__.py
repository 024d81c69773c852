"""Let other processes inspect this one: the socket, and the answers."""
