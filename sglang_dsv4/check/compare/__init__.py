"""Two ways to serve one checkpoint: whether they give the same tokens."""
