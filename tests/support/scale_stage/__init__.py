"""A stage kind of the tests' own: `kind: scale` multiplies down_proj and may keep only the first inner channels."""
