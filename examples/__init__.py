"""Photographs, and the demo that scores them: not part of the package."""
