"""The reference step plan against a loop over tokens; what is refused; and machine code for every architecture."""

import pytest

from dsv4_kernels import memory
from dsv4_kernels.step_plan import naive_step_plan, step_buffers, step_part
from dsv4_kernels.step_plan.fused import PlanInputs, step_plan, step_plan_kernel
from tests.kernels.step_plan_checks import PAGE, make_inputs, planned
from tests.kernels.test_fused_compile import ARCHITECTURES, STEP, machine_code


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
