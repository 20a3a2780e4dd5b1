"""What the machine gives: files, locks, processes, memory, progress. Knows nothing of models."""
