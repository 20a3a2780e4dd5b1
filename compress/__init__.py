"""dscompress: make large language models small enough to ship, and prove what that cost."""

__version__ = "0.1.0"
