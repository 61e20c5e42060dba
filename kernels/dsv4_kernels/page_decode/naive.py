"""Reference decoding of pages."""

import torch

from dsv4_kernels.layout import RowFormat
from dsv4_kernels.row_codec import naive_load_rows


def num_page_rows(num_window: int, num_history: int, page_tokens: int, ratio: int) -> int:
    """Rows of so many window pages and history pages of a layer with entries of ``ratio`` tokens; 0 for one without."""
    return num_window * page_tokens + (num_history * (page_tokens // ratio) if ratio else 0)


def naive_page_decode(
    pool: torch.Tensor,
    pool_format: RowFormat,
    window_pages: torch.Tensor,
    history_pages: torch.Tensor,
    page_tokens: int,
    ratio: int,
    num_window_rows: int,
    rows: torch.Tensor,
) -> None:
    """Decode the rows of window pages, then those of history pages, page after page, each page as it lies in the pool.

    Equation:
        rows[w P + i] = DECODE(pool[window_pages[w] P + i]), i < P;  then, with E = P / ratio,
        rows[W P + h E + i] = DECODE(pool[num_window_rows + history_pages[h] E + i]), i < E      [PAGES]

    Args:
        pool (torch.Tensor): a row pool.
        pool_format (RowFormat): its format.
        window_pages (torch.Tensor): ``[W]`` int64, pages of ``page_tokens`` window rows.
        history_pages (torch.Tensor): ``[H]`` int64, pages of ``page_tokens / ratio`` entries.
        page_tokens (int): tokens per page.
        ratio (int): tokens per entry; 0 for a layer without entries, of which no history page is decoded.
        num_window_rows (int): window rows of the pool; entries follow them.
        rows (torch.Tensor): ``[num_page_rows(W, H, ...), D]``. Written; rounded to nearest even. An e4m3 value times a power
            of two is exact in bf16. A row that was never stored decodes to anything.
    """

    def places(pages: torch.Tensor, per_page: int) -> torch.Tensor:
        within = torch.arange(per_page, device=pages.device)
        return (pages.unsqueeze(1) * per_page + within).flatten()

    slots = places(window_pages, page_tokens)
    if ratio:
        entries = num_window_rows + places(history_pages, page_tokens // ratio)
        slots = torch.cat([slots, entries])
    rows.copy_(naive_load_rows(pool, slots, pool_format).to(rows.dtype))
