"""Models without holding them: families as rows of data, lazy sharded checkpoints, the layer loop."""
