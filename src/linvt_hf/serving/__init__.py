"""A model that many people ask at once: in one process (`engine`), and over HTTP (`app`)."""
