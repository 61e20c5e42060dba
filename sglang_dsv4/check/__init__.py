"""What a checkpoint should answer, and whether a server does."""
