"""Text for models: where it comes from, how it becomes documents, how documents become full sequences."""
