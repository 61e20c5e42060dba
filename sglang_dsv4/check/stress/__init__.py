"""Send a server, or the in-process runtime, many requests at once, and check every answer."""
