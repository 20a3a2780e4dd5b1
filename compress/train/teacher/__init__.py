"""A teacher's predictions: asked at each step, or drawn once and kept."""
