"""SGLang's own DeepSeek-V4 model over `CompressedKVCache`. Everything that imports sglang is in here."""
