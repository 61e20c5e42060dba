"""Checks of the fused step plan against its reference, for Triton's CPU interpreter and for a GPU alike.

Run as a program it makes them on the CPU and prints ``{check: "" or its fault}``.
"""

from dataclasses import fields

import torch

from dsv4_kernels import memory
from dsv4_kernels.step_plan import naive_step_plan, step_buffers, step_part
from dsv4_kernels.step_plan.fused import step_plan
from tests.kernels.interpreting import make_checks

PAGE = 256
TENSORS = ("positions", "token_rows", "seq_lens", "extend_lens", "state_slots", "history_pages", "window_pages")


def make_inputs(lengths, extends, *, padding=0, device="cpu", seed=0, slot_dtype=torch.int64):
    """Lengths and tables as a serving engine has them: row 0 and page 0 are where it sends padding.

    A page's slots are consecutive. Slots of tokens past a sequence's end are far outside of ``window_slots``.
    """
    generator = torch.Generator().manual_seed(seed)
    count, longest = len(lengths), max([*lengths, 1])
    pages = -(-longest // PAGE)
    num_pages = count * pages + 1
    order = 1 + torch.randperm(num_pages - 1, generator=generator)[: count * pages].view(count, pages)
    slots = (order.unsqueeze(2) * PAGE + torch.arange(PAGE)).flatten(1)  # [requests, tokens]
    rows = 1 + torch.randperm(count + 3, generator=generator)[:count]
    table = torch.full((count + 4, pages * PAGE), 1 << 30)
    for row, slot, length in zip(rows.tolist(), slots, lengths, strict=True):
        table[row, :length] = slot[:length]
    table[0] = 0
    window_pages = torch.randperm(num_pages, generator=generator)
    window = (window_pages.unsqueeze(1) * PAGE + torch.arange(PAGE)).flatten()

    def tensor(values, fill, dtype):
        return torch.tensor([*values, *[fill] * padding], dtype=dtype, device=device)

    return {
        "seq_lens": tensor(lengths, 1, torch.int64),
        "extend_lens": tensor(extends, 0, torch.int32),
        "request_rows": tensor(rows.tolist(), 0, torch.int64),
        "token_slots": table.to(torch.int32).to(device),
        "window_slots": window.to(slot_dtype).to(device),
    }


def planned(plan, inputs, num_tokens, num_pages, spare=0):
    """A step planned into poisoned buffers, ``spare`` larger than the step on every side."""
    device = inputs["seq_lens"].device
    requests = len(inputs["seq_lens"])
    sizes = [size + spare for size in (requests, num_tokens, num_pages)]
    buffers = step_buffers(*sizes, PAGE, 4096, device)
    first_tokens = memory.empty((requests,), torch.int64, device)
    plan(step_part(buffers, requests, num_tokens, num_pages), first_tokens, **inputs)
    return {name: getattr(buffers, name) for name in TENSORS} | {"first_tokens": first_tokens}


def differing(one, other):
    """Names of tensors that differ."""
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


def batches(count):
    """Random batches: fresh, continued and empty requests, decode and prefill, up to 300 requests."""
    generator = torch.Generator().manual_seed(11)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for index in range(count):
        requests = (1, 3, 17, 130, 300)[index % 5]
        most = (1, 700, 40, 3, 1)[index % 5]
        extends = [number(0 if index % 2 else 1, most) for _ in range(requests)]
        starts = [number(0, 3) * PAGE + number(0, 5) * (index % 3) for _ in range(requests)]
        lengths = [start + extend for start, extend in zip(starts, extends, strict=True)]
        yield lengths, extends, number(0, 4), number(0, 40)


def check_batches(device="cpu"):
    """Every tensor, and every cell left alone, to the bit; a length that is wrong by one token is seen."""
    for index, (lengths, extends, padding, pad_tokens) in enumerate(batches(15)):
        dtype = (torch.int32, torch.int64)[index % 2]
        inputs = make_inputs(lengths, extends, padding=padding, device=device, seed=index, slot_dtype=dtype)
        size = (sum(extends) + pad_tokens, -(-max([*lengths, 1]) // PAGE) + index % 3)
        found = planned(step_plan, inputs, *size, spare=index % 4)
        expected = planned(naive_step_plan, inputs, *size, spare=index % 4)
        assert not differing(found, expected), f"batch {index}: {differing(found, expected)}"
        inputs["seq_lens"][0] += 1
        assert differing(planned(naive_step_plan, inputs, *size, spare=index % 4), expected)


def check_long_tables(device="cpu"):
    """Tables of several programs per request."""
    lengths, extends = [520 * PAGE + 3, 512 * PAGE, 5, 1030 * PAGE], [1, 1, 1, 1]
    inputs = make_inputs(lengths, extends, padding=1, device=device)
    found, expected = (planned(plan, inputs, 7, 1100) for plan in (step_plan, naive_step_plan))
    assert not differing(found, expected), differing(found, expected)


def check_nothing(device="cpu"):
    """A step of padding alone, and one without requests."""
    for lengths, padding, tokens in (([], 3, 3), ([], 0, 0), ([], 0, 2)):
        inputs = make_inputs(lengths, lengths, padding=padding, device=device)
        found, expected = (planned(plan, inputs, tokens, 2) for plan in (step_plan, naive_step_plan))
        assert not differing(found, expected), differing(found, expected)
        assert (found["positions"] == -1).all()


CHECKS = {"batches": check_batches, "long tables": check_long_tables, "nothing": check_nothing}
assert {field.name for field in fields(step_buffers(1, 1, 1, PAGE, 0, "cpu"))} > set(TENSORS)


if __name__ == "__main__":
    make_checks(CHECKS)
