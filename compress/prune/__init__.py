"""Structured pruning on tensors: what may be cut, how parts are ranked, how the rest makes up for them."""
