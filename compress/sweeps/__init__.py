"""Sweeps: many points of one recipe, with what they share done once."""
