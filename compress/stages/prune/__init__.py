"""The prune stage: plan.py says what it will do, run.py removes parts, sparse.py sets single weights to zero."""
