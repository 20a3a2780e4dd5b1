"""A recipe from its plan to its report, and what stands alone beside that."""
