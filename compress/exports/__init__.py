"""Checkpoints as the files of other programs, after the last stage."""
