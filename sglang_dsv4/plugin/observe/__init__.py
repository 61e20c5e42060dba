"""What a server says of its cache: metrics, checks, and the proof that it is ours."""
