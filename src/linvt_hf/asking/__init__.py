"""Asking a model: loading it wherever it is to run, and asking it much, of which some cannot be answered."""
