# %% [markdown]
# # The cache by hand
#
# DeepSeek-V4 does not keep its context token by token. A CSA layer pools every 4 tokens into one row, an HCA layer every
# 128; only the last 128 tokens are kept as they are. `CompressedKVCache` holds all of this, and needs no model: this
# notebook feeds it random rows, pools some of them by hand, and finds the same numbers in its memory.
#
# It runs on a CPU in a few seconds.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from dsv4_kernels.norm_rope import naive_rope
from dsv4_kernels.row_codec import naive_load_rows
from sglang_dsv4 import CacheSpec, CompressedKVCache
from sglang_dsv4.cache import CompressorWeights, NormWeights
from sglang_dsv4.errors import TruncateError

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## A cache of three layers
#
# One layer of each kind, with the dimensions of the released models. Rows are stored in fp32 here, so that they can be
# compared as numbers; a server stores bf16 or fp8. `max_draft_tokens` is how far a sequence can be rolled back.

# %%
spec = CacheSpec.from_hf(
    {
        "num_hidden_layers": 3,
        "compress_ratios": [0, 4, 128],
        "index_topk": 512,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "index_head_dim": 128,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    },
    page_tokens=128,
    row_format="fp32",
    index_format="fp32",
    max_draft_tokens=4,
)
cache = CompressedKVCache(spec, num_pages=40, max_requests=16)
for layer in spec.layers:
    print(f"layer {layer.layer_id}: {layer.kind}, {layer.ratio or 'no'} tokens per entry")

# %% [markdown]
# ## Tokens without a model
#
# A model computes, for each token and layer, a key-value row for the window, and for the compressors values and *gates*,
# the logits of the pooling. Here every word of a small vocabulary simply gets random ones. In a CSA layer a token has two
# of each: the **a-stream** is pooled into the token's own block, the **b-stream** into the next one.

# %%
VOCABULARY, DIM, INDEX_DIM = 50, 512, 128
widths = {"window": DIM, "csa": 4 * DIM, "hca": 2 * DIM, "index": 4 * INDEX_DIM}
table = {name: torch.randn(VOCABULARY, width, generator=generator) for name, width in widths.items()}
bias = {
    "csa": torch.randn(8, DIM, generator=generator),
    "hca": torch.randn(128, DIM, generator=generator),
    "index": torch.randn(8, INDEX_DIM, generator=generator),
}
ones, index_ones, EPS = torch.ones(DIM), torch.ones(INDEX_DIM), 1e-6


def bind(cache):
    """Give every layer its weights, once."""
    for layer in cache.layers:
        layer.bind(window=NormWeights(ones, EPS))
    csa, hca = cache.layers[1:]
    csa.bind(main=CompressorWeights(bias["csa"], ones, EPS), index=CompressorWeights(bias["index"], index_ones, EPS))
    hca.bind(main=CompressorWeights(bias["hca"], ones, EPS))


bind(cache)


def feed(request, tokens, cache=cache):
    """One step: plan, append every layer's part, commit."""
    tokens = torch.tensor(tokens)
    plan = cache.plan([(request, len(tokens))])
    part = {name: rows[tokens] for name, rows in table.items()}
    cache.layers[0].append(plan, window=part["window"])
    cache.layers[1].append(plan, window=part["window"], main=part["csa"], index=part["index"])
    cache.layers[2].append(plan, window=part["window"], main=part["hca"])
    cache.commit(plan)


# %% [markdown]
# Eleven tokens close two CSA blocks and leave three tokens in the third. No HCA block is closed.

# %%
tokens = torch.randint(VOCABULARY, (300,), generator=generator).tolist()
request = cache.open()
feed(request, tokens[:11])
for ratio in (4, 128):
    print(f"ratio {ratio}: {request.num_entries(ratio)} entries, tail of {request.tail_len(ratio)} tokens")

# %% [markdown]
# ## One entry, pooled by hand
#
# Entry 1 of the CSA layer covers tokens 4 to 7. It is pooled from eight rows: the b-stream of tokens 0 to 3 and the
# a-stream of tokens 4 to 7, each channel with its own softmax over the eight gates. Then it is normed, and rotated as
# position 4, its first token.

# %%
rows = table["csa"][tokens[:8]]
kv_b, kv_a, gate_b, gate_a = rows.split(DIM, dim=1)
values = torch.cat([kv_b[:4], kv_a[4:]])  # [8, 512]
gates = torch.cat([gate_b[:4], gate_a[4:]]) + bias["csa"]
weights = gates.softmax(dim=0)  # one softmax over the eight rows for each channel
pooled = (weights * values).sum(dim=0)
normed = pooled / (pooled.square().mean() + EPS).sqrt()
cos_sin = cache.layers[1].rope_table
by_hand = naive_rope(normed.unsqueeze(0), cos_sin[4:5])[0]

# %% [markdown]
# The cache keeps it in the layer's row pool, behind the window rows, on the page that the sequence owns.


# %%
def stored_entry(request, layer_id, entry):
    layer, page_tokens = spec.layers[layer_id], spec.page_tokens
    page, row = divmod(entry, page_tokens // layer.ratio)
    slot = request.pages.history[page] * (page_tokens // layer.ratio) + row
    pool = cache.layers[layer_id].pool
    return naive_load_rows(pool, torch.tensor([cache.storage.num_window_rows + slot]), spec.rows)[0]


difference = (stored_entry(request, 1, 1) - by_hand).abs().max().item()
print(f"largest difference from the stored entry: {difference:.1e}")
assert difference < 1e-5

# %%
figure, axes = plt.subplots(figsize=(9, 2.6))
image = axes.imshow(weights[:, :96], aspect="auto", cmap="viridis", vmin=0)
axes.set_yticks(range(8), [f"b of token {i}" for i in range(4)] + [f"a of token {i}" for i in range(4, 8)])
axes.set_xlabel("channel")
axes.set_title("Entry 1: how much each row gives to each channel", fontsize=10)
figure.colorbar(image)
plt.show()

# %% [markdown]
# An HCA entry is simpler: one stream, 128 rows, no neighbour. The cache computes it one token at a time and keeps only
# three numbers per channel between steps: the largest gate, the sum of the weights, and the weighted sum.

# %%
feed(request, tokens[11:200])
kv, gate = table["hca"][tokens[:128]].split(DIM, dim=1)
pooled = ((gate + bias["hca"]).softmax(dim=0) * kv).sum(dim=0)
by_hand = pooled / (pooled.square().mean() + EPS).sqrt()  # position 0: the rotation does nothing
difference = (stored_entry(request, 2, 0) - by_hand).abs().max().item()
print(f"largest difference from the stored entry: {difference:.1e}")
assert difference < 1e-5

# %% [markdown]
# ## However it is cut, the bytes are the same
#
# The sequence above came in two steps, of 11 and 189 tokens. Here it comes one token at a time. Every entry is equal to
# the last bit: pooling has one fixed order of additions.

# %%
slowly = cache.open()
for token in tokens[:200]:
    feed(slowly, [token])
same = all(
    torch.equal(stored_entry(request, layer_id, entry), stored_entry(slowly, layer_id, entry))
    for layer_id in (1, 2)
    for entry in range(200 // spec.layers[layer_id].ratio)
)
print("all entries equal:", same)
assert same
cache.close(slowly)

# %% [markdown]
# ## Fork
#
# A fork shares every page. Only when one of the two writes into the last page, which is part full, is that page copied.


# %%
def pages_free():
    return cache.report().counts["history_pages_free"]


before = pages_free()
twin = cache.fork(request)
print("pages taken by the fork:", before - pages_free())
feed(twin, tokens[250:260])
print("pages taken by its first step:", before - pages_free())
print("pages:", request.pages.history, "and", twin.pages.history)

# %% [markdown]
# ## A step that is not finished
#
# A model can fail between two layers, when some of them are written already. `abandon` takes such a step back: its pages are
# free again, the stream state is what it was, and the sequence goes on as if nothing had been appended.

# %%
lost = torch.tensor(tokens[:100])
plan = cache.plan([(twin, len(lost))])
cache.layers[0].append(plan, window=table["window"][lost])
cache.layers[1].append(plan, window=table["window"][lost], main=table["csa"][lost], index=table["index"][lost])
print("pages that the step holds:", before - pages_free())
cache.abandon(plan)  # layer 2 was never reached
print("pages after:", before - pages_free(), "- length:", twin.seq_len)

# %% [markdown]
# ## Truncate
#
# Rolling back moves nothing: the stream state keeps a few rows more than pooling needs. Further back than
# `max_draft_tokens` those rows are gone, and the cache says where it could go instead of computing something wrong.

# %%
cache.truncate(twin, twin.seq_len - 3)
print("rolled back to", twin.seq_len)
feed(twin, tokens[260:270])
try:
    cache.truncate(twin, 50)
except TruncateError as error:
    print("refused:", error)

# %% [markdown]
# A snapshot keeps any moment for as long as it is wanted.

# %%
kept = cache.snapshot(twin)
feed(twin, tokens[:40])
cache.rewind(twin, kept)
print("back at", twin.seq_len)
cache.close(kept)

# %% [markdown]
# ## Save and load
#
# A saved sequence is a small manifest beside a folder of pages. Pages are named by their content, so that ten branches
# of one conversation store their common history once.

# %%
feed(request, tokens * 3)
print(f"the common history: {request.seq_len} tokens")
folder = Path(tempfile.mkdtemp())


def size_on_disk():
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


sizes = []
for number in range(10):
    branch = cache.fork(request)
    feed(branch, tokens[number : number + 5])
    cache.save(branch, folder / f"branch-{number}.dsv4kv", extra={"number": str(number)})
    sizes.append(size_on_disk() / 2**20)
    cache.close(branch)

loaded = cache.load(folder / "branch-7.dsv4kv")
print(f"branch {loaded.extra['number']} again: {loaded.seq_len} tokens")

figure, axes = plt.subplots(figsize=(9, 2.6))
axes.bar(range(1, 11), sizes, label="on disk")
axes.plot(range(1, 11), [sizes[0] * n for n in range(1, 11)], "k--", label="if nothing were shared")
axes.set_xlabel("branches saved")
axes.set_ylabel("MiB")
axes.set_xticks(range(1, 11))
axes.legend()
plt.show()

# %% [markdown]
# ## Where everything is
#
# `check_integrity` holds the books against each other: every page has as many owners as hold it, and nothing that a query
# could read is missing.

# %%
for open_request in (request, twin, loaded):
    cache.close(open_request)
cache.check_integrity(memory=True)
counts = cache.report().counts
print(f"{counts['history_pages_free']} of {counts['history_pages']} pages are free again")
cache.report()
