"""Talks to an SGLang server over HTTP."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import groupby
from typing import Any

import httpx

from sglang_dsv4.check.demo.answers import Answer, read_answer
from sglang_dsv4.check.demo.workload import PlannedRequest

TIMEOUT_S = 120.0


class Client:
    """One server.

    Args:
        url (str): such as ``http://127.0.0.1:30000``.
        vocab_size (int): tokens of the model; the log-probabilities of all of them are asked for.
        transport (httpx.BaseTransport | None): for tests; None: the network.
    """

    def __init__(self, url: str, vocab_size: int, transport: httpx.BaseTransport | None = None) -> None:
        # A proxy named in the environment must not come between two processes of one machine.
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S, transport=transport, trust_env=False)
        self._vocab = list(range(vocab_size))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def is_healthy(self) -> bool:
        """Whether the server takes requests."""
        try:
            return self._http.get("/health", timeout=5.0).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def generate(self, request: PlannedRequest, new_tokens: int) -> Answer:
        """Ask for one greedy continuation with the log-probabilities of every token.

        Raises:
            httpx.HTTPError: the server did not answer, or refused.
            ValueError: the reply is not complete.
        """
        started = time.monotonic()
        body = {
            "input_ids": list(request.prompt_ids),
            "sampling_params": {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True},
            "return_logprob": True,
            # Only of what is generated: asking for the prompt's would keep the prefix cache from serving it.
            "logprob_start_len": -1,
            "token_ids_logprob": self._vocab,
        }
        response = self._http.post("/generate", json=body).raise_for_status()
        return read_answer(request.name, request.prompt_ids, response.json(), time.monotonic() - started)

    def run(self, requests: Sequence[PlannedRequest], new_tokens: int, step: Callable[[], None]) -> list[Answer]:
        """Send each wave's requests at the same time; ``step`` is called as each answer arrives.

        Returns:
            list[Answer]: in the order of ``requests``.
        """
        answers: dict[PlannedRequest, Answer] = {}
        for wave in _waves(requests):
            with ThreadPoolExecutor(max_workers=len(wave)) as pool:
                futures = {pool.submit(self.generate, request, new_tokens): request for request in wave}
                for future in as_completed(futures):
                    answers[futures[future]] = future.result()
                    step()
        return [answers[request] for request in requests]

    def plugin_facts(self) -> dict[str, Any] | None:
        """What the plug-in says about itself in ``/server_info``; None if it says nothing."""
        states = self._http.get("/server_info").raise_for_status().json().get("internal_states") or [{}]
        return states[0].get("sglang_dsv4")


def _waves(requests: Sequence[PlannedRequest]) -> Iterator[list[PlannedRequest]]:
    for _, wave in groupby(sorted(requests, key=lambda request: request.wave), key=lambda request: request.wave):
        yield list(wave)
