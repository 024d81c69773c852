"""Code that compiled functions call at run time."""
