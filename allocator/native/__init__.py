"""C code for paths on which Python is too slow, and the loader that compiles it."""
