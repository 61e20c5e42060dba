"""Prefixes of earlier sequences, found again and evicted."""
