"""Measurements, not tests: each module prints a table and writes its numbers as JSON."""
