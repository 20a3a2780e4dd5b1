"""Models from GGUF files: the header, what it says about the computation, the tokenizer, the weights."""
