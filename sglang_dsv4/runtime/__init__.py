"""DeepSeek-V4 in this process, for notebooks and experiments: transformers' model over a `CompressedKVCache`.

`Runtime` opens sequences and `Handle` continues, forks and rolls back one; both work through `Engine`, which batches steps. Prefixes
of earlier sequences are kept in `prefix_cache`, and what a user sees is made in `show`.
"""
