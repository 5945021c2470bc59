"""Training: data files to labelled samples, and what trains on them. Stays at home; no model folder needs it."""
