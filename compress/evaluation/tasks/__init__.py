"""Benchmark tasks of lm-eval on base and result: names, answers that are kept, both models compared."""
