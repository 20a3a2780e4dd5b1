"""The layer loop: a model run one decoder layer at a time, so that it is never held."""
