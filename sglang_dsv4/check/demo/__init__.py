"""Serve a tiny checkpoint with SGLang and this cache, and check every answer."""
