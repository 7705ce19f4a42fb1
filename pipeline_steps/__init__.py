"""Seeing Sound: pair pictures with sounds, and draw what is heard."""

__version__ = "0.1.0"
