"""One sequence that the scheduler works on."""

from dataclasses import dataclass

from sglang_dsv4.cache import Request
from sglang_dsv4.runtime.output import Output
from sglang_dsv4.runtime.sampling import Sampler
from sglang_dsv4.runtime.sequence import LiveSequence


@dataclass(eq=False)
class Job:
    """Feed a sequence what is pending, then continue it until the output is done.

    Attributes:
        sequence (LiveSequence): the sequence.
        output (Output): what is generated.
        sampler (Sampler): draws the next token.
        is_owned (bool): somebody outside holds the request: it is neither preempted, nor closed when the work fails.
        num_settled (int): tokens of an owned sequence that it keeps, fed or not, when the work fails.
        stays_open (bool): the request is left open when the work is done.
        is_prompt_fed (bool): the tokens given at first are all fed.
        is_finished (bool): there is nothing left to do.
    """

    sequence: LiveSequence
    output: Output
    sampler: Sampler
    is_owned: bool = False
    num_settled: int = 0
    stays_open: bool = False
    is_prompt_fed: bool = False
    is_finished: bool = False

    @property
    def request(self) -> Request:
        """The sequence's request, once it runs."""
        assert self.sequence.request is not None, "a running job has a request"
        return self.sequence.request

    @property
    def left(self) -> int:
        """Tokens to be fed until it is done, at most."""
        return 0 if self.is_finished else self.sequence.num_pending + self.output.room

    def sample(self) -> None:
        """Append the next token, to be fed in the next step."""
        logits = self.sequence.logits
        assert logits is not None, "everything is fed"
        token = self.sampler.choose(logits)
        self.sequence.tokens.append(token)
        self.output.take(token)
