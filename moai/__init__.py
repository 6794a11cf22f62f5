"""moai: from raw text to the first training step."""

__version__ = "0.1.0"
