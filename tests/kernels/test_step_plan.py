"""The step plan: the reference against a loop over tokens, what is refused, the kernel to the bit, capture, machine code."""

import pytest
import torch

from dsv4_kernels import memory
from dsv4_kernels.step_plan import naive_step_plan, step_buffers, step_part
from dsv4_kernels.step_plan.fused import PlanInputs, StepPlanLaunch, step_plan, step_plan_kernel
from tests.kernels.compiling import ARCHITECTURES, STEP, machine_code
from tests.kernels.interpreting import interpreted_checks

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


def test_matches_a_loop_over_tokens():
    lengths, extends, unwritten = [600, 256, 10, 1, 257], [1, 256, 0, 1, 3], 2**63 - 1
    inputs = make_inputs(lengths, extends, padding=2)
    memory.set_poison(True)
    found = planned(naive_step_plan, inputs, 300, 4)
    positions, rows = [], []
    for row, (length, count) in enumerate(zip(lengths, extends, strict=True)):
        assert found["first_tokens"][row] == len(rows)
        positions += range(length - count, length)
        rows += [row] * count
        slots = inputs["token_slots"][inputs["request_rows"][row]]
        for page in range(4):
            history, window = unwritten, unwritten
            if count and page * PAGE < length:
                history = int(slots[page * PAGE]) // PAGE
                window = int(inputs["window_slots"][slots[page * PAGE]]) // PAGE
            assert found["history_pages"][row, page] == history
            assert found["window_pages"][row, page] == window
    padding = 300 - len(rows)
    assert found["positions"].tolist() == positions + [-1] * padding
    assert found["token_rows"].tolist() == rows + [0] * padding
    assert found["seq_lens"].tolist() == [*lengths, 1, 1]
    assert found["extend_lens"].tolist() == [*extends, 0, 0]
    assert found["state_slots"].tolist() == inputs["request_rows"].tolist()
    assert (found["history_pages"][5:] == unwritten).all()


def test_a_part_is_a_view():
    buffers = step_buffers(4, 9, 5, PAGE, 77, "cpu")
    part = step_part(buffers, 2, 3, 4)
    part.positions.fill_(6)
    part.window_pages.fill_(8)
    assert (buffers.positions[:3] == 6).all() and (buffers.window_pages[:2, :4] == 8).all()
    assert (part.page_tokens, part.num_window_rows) == (PAGE, 77)
    assert not (buffers.positions[3:] == 6).any() and not (buffers.window_pages[2:] == 8).any()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((5, 1, 1), "num_requests: expected 0 .. 4, got 5"),
        ((1, 10, 1), "num_tokens: expected 0 .. 9, got 10"),
        ((1, 1, 6), "num_pages: expected 0 .. 5, got 6"),
        ((-1, 1, 1), "num_requests: expected 0 .. 4, got -1"),
    ],
)
def test_a_part_larger_than_its_buffers_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        step_part(step_buffers(4, 9, 5, PAGE, 0, "cpu"), *sizes)


def test_lengths_of_another_batch_are_refused():
    inputs = make_inputs([5, 6], [1, 1])
    inputs["extend_lens"] = inputs["extend_lens"][:1]
    with pytest.raises(ValueError, match="extend_lens: expected 2 requests, got 1"):
        planned(step_plan, inputs, 2, 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(architecture):
    given = PlanInputs("*i64", "*i32", "*i64", "*i32", "*i64")
    counts = ("num_requests", "num_tokens", "num_pages", "slot_stride", "page_stride")
    arguments = {"given": given, "out": STEP, "p_first_tokens": "*i64", **dict.fromkeys(counts, "i32")}
    constants = {"PAGE": PAGE, "BT": 32, "BR": 128, "BP": 512}
    assert machine_code(step_plan_kernel, arguments, constants, architecture, 4)


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


def planned_alike(cases, device):
    """Every tensor, and every cell left alone, to the bit; a length that is wrong by one token is seen."""
    for index, (lengths, extends, padding, pad_tokens) in cases:
        dtype = (torch.int32, torch.int64)[index % 2]
        inputs = make_inputs(lengths, extends, padding=padding, device=device, seed=index, slot_dtype=dtype)
        size = (sum(extends) + pad_tokens, -(-max([*lengths, 1]) // PAGE) + index % 3)
        found = planned(step_plan, inputs, *size, spare=index % 4)
        expected = planned(naive_step_plan, inputs, *size, spare=index % 4)
        assert not differing(found, expected), f"batch {index}: {differing(found, expected)}"
        inputs["seq_lens"][0] += 1
        assert differing(planned(naive_step_plan, inputs, *size, spare=index % 4), expected)


def check_small(device="cpu"):
    """A batch of seventeen, one of 130, a step of padding alone, and one without requests."""
    planned_alike(list(enumerate(batches(4)))[2:], device)
    for lengths, padding, tokens in (([], 3, 3), ([], 0, 0), ([], 0, 2)):
        inputs = make_inputs(lengths, lengths, padding=padding, device=device)
        found, expected = (planned(plan, inputs, tokens, 2) for plan in (step_plan, naive_step_plan))
        assert not differing(found, expected), differing(found, expected)
        assert (found["positions"] == -1).all()


def check_batches(device="cpu"):
    """Up to 300 requests."""
    planned_alike(enumerate(batches(15)), device)


def check_long_tables(device="cpu"):
    """Tables of several programs per request."""
    lengths, extends = [520 * PAGE + 3, 512 * PAGE, 5, 1030 * PAGE], [1, 1, 1, 1]
    inputs = make_inputs(lengths, extends, padding=1, device=device)
    found, expected = (planned(plan, inputs, 7, 1100) for plan in (step_plan, naive_step_plan))
    assert not differing(found, expected), differing(found, expected)


SMALL = (check_small,)
CHECKS = (check_batches, check_long_tables)


@pytest.mark.parametrize("check", interpreted_checks(SMALL, CHECKS))
def test_interpreted(interpret, check):
    assert interpret(check) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("check", SMALL + CHECKS)
def test_on_a_gpu(check):
    check(device="cuda")


@pytest.mark.gpu
def test_a_captured_plan_follows_its_inputs():
    """One decode graph of four requests: replayed for two requests of other lengths, its rest is padding."""
    given = make_inputs([300, 5, 600, 256], [1, 1, 1, 1], device="cuda", seed=1)
    later = make_inputs([512, 601], [1, 1], padding=2, device="cuda", seed=2)
    later["token_slots"] = torch.nn.functional.pad(later["token_slots"], (0, 0, 0, 2))
    later["window_slots"] = torch.nn.functional.pad(
        later["window_slots"], (0, len(given["window_slots"]) - len(later["window_slots"]))
    )
    out = step_buffers(4, 4, 3, PAGE, 4096, "cuda")
    first_tokens = torch.zeros(4, dtype=torch.int64, device="cuda")
    step_plan(out, first_tokens, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_plan(out, first_tokens, **given)
    for name, tensor in later.items():
        given[name].copy_(tensor)
    for name in TENSORS:
        getattr(out, name).fill_(2**63 - 1)
    graph.replay()
    found = {name: getattr(out, name) for name in TENSORS} | {"first_tokens": first_tokens}
    assert not differing(found, planned(naive_step_plan, later, 4, 3))


@pytest.mark.gpu
def test_a_kept_launch_follows_its_inputs():
    given = make_inputs([300, 5, 600, 256], [1, 1, 1, 1], device="cuda", seed=1)
    later = make_inputs([301, 6, 601, 257], [1, 1, 1, 1], device="cuda", seed=2)
    out = step_buffers(4, 4, 3, PAGE, 4096, "cuda")
    first_tokens = torch.zeros(4, dtype=torch.int64, device="cuda")
    launch = StepPlanLaunch(out, first_tokens, **given)
    first = {name: tensor.clone() for name, tensor in given.items()}
    for inputs in (first, later, first):
        for name, tensor in inputs.items():
            given[name].copy_(tensor)
        for name in TENSORS:
            getattr(out, name).fill_(2**63 - 1)
        launch()
        found = {name: getattr(out, name) for name in TENSORS} | {"first_tokens": first_tokens}
        assert not differing(found, planned(naive_step_plan, inputs, 4, 3))
