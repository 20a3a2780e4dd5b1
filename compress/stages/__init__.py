"""Stages: `stage(spec, parent, output, context) -> record`, each from a checkpoint to a checkpoint folder."""
