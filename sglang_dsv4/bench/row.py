"""What is kept of a measurement."""

from dataclasses import dataclass
from typing import Any

from sglang_dsv4.bench.timing import Timing


@dataclass(frozen=True)
class Row:
    """One measurement; times in microseconds a call, None where not run.

    Attributes:
        op (str): the operation.
        case (str): of `sglang_dsv4.bench.cases`, by name.
        shape (str): of the case, for people.
        row_format (str): of the rows or keys that are written or read.
        input_dtype (str): of the new tokens' rows.
        us (float): median of ours, with inputs and states that left the L2 cache.
        p10_us, p90_us (float): a tenth of the rounds was faster, a tenth slower.
        bytes (int): the fewest that the operation can move.
        copy_percent (float): rate at which they moved, in percent of a copy's.
        sglang_us (float | None): SGLang's own kernels on the same work.
        torch_us (float | None): the reference.
    """

    op: str
    case: str
    shape: str
    row_format: str
    input_dtype: str
    us: float
    p10_us: float
    p90_us: float
    bytes: int
    copy_percent: float
    sglang_us: float | None = None
    torch_us: float | None = None


def speed(timing: Timing, moved: int, bandwidth: float) -> dict[str, Any]:
    """The fields of a row that come from its timing.

    Args:
        timing (Timing): of ours.
        moved (int): bytes that a call must move.
        bandwidth (float): bytes per microsecond of a copy.
    """
    return {
        "us": timing.median_us,
        "p10_us": timing.p10_us,
        "p90_us": timing.p90_us,
        "bytes": moved,
        "copy_percent": 100 * moved / timing.median_us / bandwidth,
    }
