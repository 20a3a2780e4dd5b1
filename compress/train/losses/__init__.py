"""What training minimises: a file for each loss, and one for how logits are never held."""
