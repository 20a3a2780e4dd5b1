"""Checkpoint formats: pure functions from quantized matrices to named tensors and a `quantization_config`."""
