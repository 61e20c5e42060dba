"""Which rows of a cache the next tokens of a sequence read, found by autograd: those that what is computed depends on.

Nothing of `sglang_dsv4.cache.regions` takes part beside where a region's memory is. The references run on copies of the
memory; a row with a gradient was read, and a row that is only gathered and masked was not.
"""

import copy
from dataclasses import replace
from unittest import mock

import torch

from dsv4_kernels.flush_csa import naive_flush_csa
from dsv4_kernels.flush_hca import naive_flush_hca
from dsv4_kernels.index_select import naive as index_select
from dsv4_kernels.sparse_attention import naive_sparse_attention
from dsv4_kernels.step import StepTensors
from dsv4_kernels.window_store import naive_window_store
from sglang_dsv4.cache import CompressedKVCache, Request
from sglang_dsv4.cache.kernels import LayerMemory
from sglang_dsv4.cache.regions import Kind, Part
from sglang_dsv4.cache.step_rows import StepRows
from tests.cache.driver import TokenInputs

NEXT = 8  # closes the open CSA block, and the one after it, which pools the open one's b-stream
INDEX_HEADS = 64


def rows_read(cache: CompressedKVCache, request: Request, length: int, inputs: TokenInputs) -> dict[str, set[int]]:
    """By region, the rows that the `NEXT` tokens after the first ``length`` read; rows are stored as fp32."""
    step = next_step(cache, request, length)
    found: dict[str, set[int]] = {}
    for layer in cache.layers:
        leaves = {id(stored.tensor): stored.tensor.detach().clone().requires_grad_() for stored in layer.memory.storage.regions}
        work = {key: leaf.clone() for key, leaf in leaves.items()}
        with mock.patch.object(torch.Tensor, "unbind", unbind_copies):
            run_layer(on(layer.memory, work), step, inputs).backward()
        for stored in layer.memory.storage.regions:
            leaf, region = leaves[id(stored.tensor)], stored.region
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            rows = grad if region.row_format is not None else grad.flatten(0, 1)
            count = cache.storage.num_window_rows if region.kind is Kind.WINDOW_ROW else len(rows) - stored.first_row
            touched = rows[stored.first_row : stored.first_row + count].flatten(1).ne(0).any(1)  # NaN, too
            found[region.name] = set(torch.nonzero(touched).flatten().tolist())
    return found


def next_step(cache: CompressedKVCache, request: Request, length: int) -> StepTensors:
    """The step that continues a request from ``length``, over its own pages and then any free ones."""
    allocator = cache.requests.allocator
    tables = [
        torch.tensor([[*held, *pool.free[-2:]]], dtype=torch.int64)
        for held, pool in ((request.pages.history, allocator.history), (request.pages.window, allocator.window))
    ]
    return StepTensors(
        positions=torch.arange(length, length + NEXT),
        token_rows=torch.zeros(NEXT, dtype=torch.int64),
        seq_lens=torch.tensor([length + NEXT]),
        extend_lens=torch.tensor([NEXT]),
        state_slots=torch.tensor([request.state_slot]),
        history_pages=tables[0],
        window_pages=tables[1],
        page_tokens=cache.spec.page_tokens,
        num_window_rows=cache.storage.num_window_rows,
    )


def unbind_copies(tensor: torch.Tensor, dim: int = 0) -> tuple[torch.Tensor, ...]:
    """For `torch.Tensor.unbind`, whose views autograd does not let the references write into."""
    return tuple(tensor.select(dim, number).clone() for number in range(tensor.shape[dim]))


def on(memory: LayerMemory, tensors: dict[int, torch.Tensor]) -> LayerMemory:
    """The layer over other tensors, by the identity of its own."""
    storage = copy.copy(memory.storage)
    storage.regions = tuple(replace(stored, tensor=tensors[id(stored.tensor)]) for stored in storage.regions)
    return replace(memory, storage=storage)


def run_layer(memory: LayerMemory, step: StepTensors, inputs: TokenInputs) -> torch.Tensor:
    """One number that depends on all that a layer computes: attention, scores, and accumulators of a block that stays open."""
    layer, spec, pool = memory.layer, memory.spec, memory.storage.pool
    generator = torch.Generator().manual_seed(0)
    given = {part: inputs.cut(layer.layer_id, part, 0, NEXT) for part in inputs.parts[layer.layer_id]}
    window = given.pop("window")
    naive_window_store(step, window.kv, window.norm_weight, window.eps, memory.rope_table, pool, spec.rows)
    total = torch.zeros(())
    for name, part in given.items():
        params, (target, fmt) = memory.params(Part(name), part.weights), memory.target(Part(name))
        if layer.overlap:
            streams, boundary = (memory.tensor(kind, Part(name)) for kind in (Kind.STREAM, Kind.BOUNDARY))
            naive_flush_csa(step, part.kv_score, streams, boundary, target, fmt, params)
        else:
            accumulators = memory.tensor(Kind.ACCUMULATOR, Part(name))
            assert accumulators.shape[1] <= NEXT, "every accumulator of the slot is this step's"
            naive_flush_hca(step, part.kv_score, accumulators, target, fmt, params)
            total = total + accumulators[step.state_slots].square().sum()
    if layer.indexed:
        total = total + scores(memory, step, generator).square().sum()
    rows = StepRows(step, spec.window)
    lists = rows.window if not layer.ratio else torch.cat([rows.window, rows.every_entry(layer.ratio)], 1)
    lists = lists[[0, -1]]  # the first token reaches furthest back, the last one sees every entry of the step
    q = torch.randn(2, 1, spec.head_dim, generator=generator)
    out, _ = naive_sparse_attention(q, pool, spec.rows, lists, torch.zeros(1), spec.head_dim**-0.5)
    return total + out.square().sum()


def scores(memory: LayerMemory, step: StepTensors, generator: torch.Generator) -> torch.Tensor:
    """The scores from which `naive_select_entries` chooses."""
    spec, found = memory.spec, []
    stock = index_select.naive_index_scores
    index_q = torch.randn(NEXT, INDEX_HEADS, spec.index_dim, generator=generator)
    with mock.patch.object(index_select, "naive_index_scores", lambda *given: found.append(stock(*given)) or found[-1]):
        index_select.naive_select_entries(
            step,
            index_q,
            torch.ones(NEXT, INDEX_HEADS),
            memory.tensor(Kind.INDEX_KEY, Part.INDEX),
            spec.index_keys,
            memory.rope_table,
            memory.layer.ratio,
            torch.empty(NEXT, 1, dtype=torch.int32),
        )
    return torch.cat(found)
