"""The quantize stage: plan.py says what it will do, run.py does it."""
