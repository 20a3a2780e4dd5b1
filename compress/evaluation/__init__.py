"""What compression cost: divergence from the base model and perplexity."""
