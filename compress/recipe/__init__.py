"""What a YAML file may say, and how problems with it are said. Never imports torch."""
