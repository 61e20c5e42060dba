"""What a cache holds, counted, checked and shown."""
