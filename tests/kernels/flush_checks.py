"""What the checks of the window store and of both flushes share: kernels against references, and against themselves."""

import torch

from tests.kernels.flush_world import HCA_RATIO

# Relative error of a pooled fp32 value. A weight exp2((g - m) log2 e) is off by 2^-24 (1 + 2 |g - m|) from its argument and
# 2^-22 from the exponential; gates here differ by less than 30, and HCA rescales a sum 128 times, by 2^-22 each. The norm
# divides by a mean of such values. 2^-15 of the row's largest value is an upper bound of all that.
POOL_ERROR = 2.0**-15


def schedule_state(world, schedule, *, pad=0, **options):
    """State after running a schedule by the kernel; steps get up to ``pad`` padding tokens and requests."""
    state = world.fresh_state()
    for number, items in enumerate(schedule):
        padding = number % (pad + 1)
        step, given = world.step(items, pad_tokens=padding, pad_requests=padding)
        world.run_fused(state, step, given, **options)
    return state


def same_bytes(first, second):
    """Whether two states' pools are equal."""
    pools = [name for name in first if name.endswith("pool")]
    return all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in pools)


def _kept_accumulators(world, accumulators):
    """Without those that the kernel does not keep: the one after a block's last token is not read again."""
    kept = accumulators.clone()
    for sequence, length in enumerate(world.lengths):
        for position in range(max(0, length - kept.shape[1]), length):
            if position % HCA_RATIO == HCA_RATIO - 1:
                kept[world.slots[sequence], position % kept.shape[1]] = float("nan")
        if length % HCA_RATIO == 0 or length % HCA_RATIO < kept.shape[1]:
            kept[world.slots[sequence]] = float("nan")
    return kept


def faults_against_naive(world, schedule, *, before=(), hit=False, wrong=0.0, **options):
    """Run a schedule by the kernel and by the reference; what differs by more than rounding, by name.

    Args:
        world: of fp32 rows.
        schedule: steps; they get some padding tokens and requests.
        before: steps that the reference runs for both.
        hit: the request starts at a page after a prefix hit, so its stream rows are not those of the steps before.
        wrong: added to one channel of the reference's inputs.
        options: of the kernel's launcher.
    """
    theirs = world.fresh_state()
    for items in before:
        world.run_naive(theirs, *world.step(items))
    if hit:
        theirs |= {name: torch.full_like(theirs[name], float("nan")) for name in theirs if name.endswith("streams")}
    ours = {name: tensor.clone() for name, tensor in theirs.items()}
    for number, items in enumerate(schedule):
        step, given = world.step(items, pad_tokens=number % 3, pad_requests=number % 2)
        world.run_fused(ours, step, given, together=number % 2 == 0, **options)
        step, given = world.step(items)
        for tensor in given.values():
            tensor[..., -1] += wrong  # one gate channel of every token
        world.run_naive(theirs, step, given)
    found = []
    for name, tensor in ours.items():
        expected, exact = theirs[name], name.endswith(("streams", "boundary"))
        if name == "accumulators":
            expected = _kept_accumulators(world, expected)
            tensor = tensor.masked_fill(expected.isnan(), float("nan"))
        if not torch.equal(tensor.isnan(), expected.isnan()):
            found.append(f"{name}: other rows were written")
        bound = 0.0 if exact else POOL_ERROR * expected.nan_to_num().abs().amax(-1, keepdim=True)
        if ((tensor - expected).nan_to_num().abs() > bound).any():
            found.append(f"{name}: {(tensor - expected).nan_to_num().abs().max().item()}")
    return found


def check_a_captured_step_replays(world, steps):
    """On a GPU: a graph of each step writes what the step writes."""
    steps = [world.step(items) for items in steps]
    eager, replayed = world.fresh_state(), world.fresh_state()
    for step, given in steps:
        world.run_fused(eager, step, given)
    graphs = []
    for step, given in steps:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            world.run_fused(replayed, step, given, together=False)
        graphs.append(graph)
    assert not same_bytes(eager, replayed)
    for graph in graphs:
        graph.replay()
    torch.cuda.synchronize()
    assert same_bytes(eager, replayed)
