"""Training: the loop, what it minimises, where a teacher's predictions come from."""
