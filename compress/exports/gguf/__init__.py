"""A checkpoint as a GGUF file for llama.cpp: header, tokenizer, tensors; `compress.model.gguf` reads them back."""
