"""Pictures and reports of a runtime."""
