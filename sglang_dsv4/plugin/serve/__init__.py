"""What runs in every step of a server."""
