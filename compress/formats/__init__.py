"""Checkpoint formats: pure functions from quantized matrices to named tensors and a `quantization_config`, and back.

One module for each format (pack_quantized, w8a8, gptq, torchao) has its tensors, its config, what it can't hold and
notes on who opens it, and gives them as a `Format` (base) to the table. `dequantized` reads any of them as a dense
checkpoint. `facts` (names, dtypes of scales, bytes on disk) and `openers` (who opens what) never import torch.
"""
