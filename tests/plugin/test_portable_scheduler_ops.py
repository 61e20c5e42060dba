"""Slot allocation against a dictionary, over random requests."""

import random

import pytest
import torch

from sglang_dsv4.plugin.install.portable.scheduler_ops import PADDING_PAGE, alloc_decode, alloc_extend, no_triton

PAGE = 256


class Book:
    """The rule in plain Python: a token's slot is the next one of its request's last page, or the first of a free page."""

    def __init__(self, num_pages, seed):
        self.rng = random.Random(seed)
        self.free = list(range(1, num_pages + 1))
        self.rng.shuffle(self.free)
        self.slots: dict[int, list[int]] = {}

    def extend(self, request, num_tokens):
        held = self.slots.setdefault(request, [])
        new = []
        for _ in range(num_tokens):
            new.append(self.free.pop(0) * PAGE if len(held) % PAGE == 0 else held[-1] + 1)
            held.append(new[-1])
        return new

    def close(self, request):
        pages = dict.fromkeys(slot // PAGE for slot in self.slots.pop(request))
        self.free = [*pages, *self.free]


def launch(kernel, lengths, *rest):
    out = torch.full((sum(lengths),), -7, dtype=torch.int64)
    kernel[(len(lengths),)](*rest, out, 8, PAGE)
    return out.tolist()


def last_slots(book, requests, dtype=torch.int64):
    return torch.tensor([(book.slots.get(request) or [-1])[-1] for request in requests], dtype=dtype)


def extend(book, requests, lengths, dtype=torch.int64):
    before = torch.tensor([len(book.slots.get(request, [])) for request in requests], dtype=dtype)
    after = before + torch.tensor(lengths, dtype=dtype)
    return launch(alloc_extend, lengths, before, after, last_slots(book, requests, dtype), torch.tensor(book.free))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_random_requests_get_the_slots_of_the_book(seed, dtype):
    book = Book(num_pages=60, seed=seed)
    for step in range(40):
        if book.slots and book.rng.random() < 0.3:
            book.close(book.rng.choice(list(book.slots)))
        if book.slots and book.rng.random() < 0.6:
            requests = list(book.slots)
            after = torch.tensor([len(book.slots[request]) + 1 for request in requests], dtype=dtype)
            free = torch.tensor(book.free, dtype=torch.int64)
            found = launch(alloc_decode, [1] * len(requests), after, last_slots(book, requests, dtype), free)
            assert found == [book.extend(request, 1)[0] for request in requests]
        elif len(book.free) > 20:
            old = book.rng.sample(list(book.slots), k=min(2, len(book.slots)))
            requests = [*old, 1000 + step]
            lengths = [book.rng.choice([1, 5, 255, 256, 257, 512, 900]) for _ in requests]
            found = extend(book, requests, lengths, dtype)
            expected = [
                slot for request, length in zip(requests, lengths, strict=True) for slot in book.extend(request, length)
            ]
            assert found == expected
            assert len(set(found)) == len(found)
    held = [slot for slots in book.slots.values() for slot in slots]
    assert len(set(held)) == len(held)


@pytest.mark.parametrize("boundary", [PAGE - 1, PAGE, PAGE + 1, 2 * PAGE])
def test_every_length_around_a_page(boundary):
    for first in (0, 1, boundary - 1, boundary, boundary + 1):
        for length in (1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE):
            book = Book(num_pages=12, seed=first)
            book.extend(0, first)
            assert extend(book, [0, 1], [length, 3]) == book.extend(0, length) + book.extend(1, 3)


def test_a_wrong_last_slot_shows():
    book = Book(num_pages=4, seed=0)
    book.extend(0, 10)
    args = (torch.tensor([10]), torch.tensor([14]), last_slots(book, [0]) + 1, torch.tensor(book.free))
    assert launch(alloc_extend, [4], *args) != book.extend(0, 4)


def test_a_shortage_gives_the_padding_page_and_does_not_fail():
    """SGLang counts pages after the launch, and then discards it; a Triton kernel would have read past the end."""
    found = launch(
        alloc_extend, [600], torch.tensor([0]), torch.tensor([600]), torch.tensor([-1]), torch.tensor([5], dtype=torch.int64)
    )
    assert found[:PAGE] == list(range(5 * PAGE, 6 * PAGE))
    assert {slot // PAGE for slot in found[PAGE:]} == {PADDING_PAGE}
    empty = torch.empty(0, dtype=torch.int64)
    assert launch(alloc_decode, [1, 1], torch.tensor([257, 5]), torch.tensor([999, 700]), empty) == [0, 701]


def test_no_requests():
    empty = torch.empty(0, dtype=torch.int64)
    assert launch(alloc_extend, [], empty, empty, empty, torch.tensor([3, 4])) == []


def test_no_backend_may_use_triton():
    assert not no_triton("dsv4") and not no_triton("triton")


@pytest.mark.sglang
@pytest.mark.parametrize("seed", range(5))
def test_equals_sglangs_own_torch_function(seed):
    from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive

    book = Book(num_pages=60, seed=seed)
    for request in range(4):
        book.extend(request, book.rng.randrange(0, 700))
    requests, lengths = [3, 0, 1, 9], [book.rng.randrange(1, 800) for _ in range(4)]
    before = torch.tensor([len(book.slots.get(request, [])) for request in requests])
    out = torch.empty(sum(lengths), dtype=torch.int64)
    alloc_extend_naive(
        before, before + torch.tensor(lengths), last_slots(book, requests), torch.tensor(book.free), out, PAGE, "cpu"
    )
    assert extend(book, requests, lengths) == out.tolist()
