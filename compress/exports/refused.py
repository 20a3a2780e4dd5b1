"""What no other program can be given, in words that follow the checkpoint's name."""

ROUNDS_INPUTS = "is quantized as torchao, whose weights round inputs too; quantize it as another format"
