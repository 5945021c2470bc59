"""A world of moving shapes, made for asking: its videos and questions, and small models that learn it."""
