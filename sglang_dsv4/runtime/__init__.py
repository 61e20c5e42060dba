"""DeepSeek-V4 in this process, by transformers: what a checkpoint should answer."""
