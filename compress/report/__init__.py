"""From the record of a run to JSON, Markdown, HTML and a model card. Reads records only: no torch here."""
