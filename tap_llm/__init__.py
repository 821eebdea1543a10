"""tap-llm: point at anything in an image and get its mask, its name, a caption and a conversation about it."""

__version__ = "0.1.0"
