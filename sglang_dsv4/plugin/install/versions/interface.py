"""What the plug-in must know of a version of SGLang, as data and a few functions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_dsv4.plugin.install.hooks import Hook


@dataclass(frozen=True)
class Refusal:
    """One option of SGLang that is refused.

    Attributes:
        option (str): what the user set, as on the command line.
        reason (str): why it cannot be served.
        allowed (tuple[Any, ...]): values that ask for nothing, besides None, False and nothing at all.
    """

    option: str
    reason: str
    allowed: tuple[Any, ...] = ()

    @property
    def field(self) -> str:
        """Its name in SGLang's arguments."""
        return self.option.removeprefix("--").replace("-", "_")

    def is_set(self, args: Any) -> bool:
        """Whether these arguments ask for it."""
        value = getattr(args, self.field, None)
        return bool(value) and value not in self.allowed


@dataclass(frozen=True, eq=False)
class SGLangVersion:
    """One version.

    Attributes:
        number (str): the version on which all of this was checked.
        answers (Mapping[str, bool]): to each probe of `probes`, by its name.
        resolve (str): dotted path of the method in which arguments get the values that the server runs with.
        is_resolved (Callable[[Any], bool]): whether that has happened to these arguments, perhaps in another process.
        view (Callable[[Any], Any]): the same arguments with the values that the server runs with.
        serve_hooks (tuple[Hook, ...]): keep ``sglang serve`` at its language models.
        hooks (tuple[Hook, ...]): needed by this version alone.
        names (Mapping[str, str]): dotted paths that the plug-in touches in this version alone, and what for.
        ops (Mapping[str, tuple[str, ...]]): where the portable ops stand that moved: the definition, and other paths to it.
        refusals (tuple[Refusal, ...]): of options that this version alone has.
        window_tokens (Callable[[Any, int, int], int]): tokens of the sliding-window pool, by SGLang's configurator, the tokens
            of the other pools and the page size.
        window_share (Callable[[Any], float]): tokens of that pool that each further token of the others brings, by configurator.
        asked_window_tokens (Callable[[Any], int | None]): tokens of that pool by resolved arguments; None where they do not say.
        window_advice (str): what decides that pool's size, for a user who must raise it.
        check_pool (Callable[[Any], None]): refuse a pool of SGLang's that is laid out for another model.
        begin_without_server (Callable[[], None]): make what SGLang's pool reads of its configuration, for a pool without a server.
        prefix_cache (Callable[[Any], str]): what keeps the prefixes, by SGLang's tree cache.
    """

    number: str
    answers: Mapping[str, bool]
    resolve: str
    is_resolved: Callable[[Any], bool]
    view: Callable[[Any], Any]
    serve_hooks: tuple[Hook, ...]
    hooks: tuple[Hook, ...]
    names: Mapping[str, str]
    ops: Mapping[str, tuple[str, ...]]
    refusals: tuple[Refusal, ...]
    window_tokens: Callable[[Any, int, int], int]
    window_share: Callable[[Any], float]
    asked_window_tokens: Callable[[Any], int | None]
    window_advice: str
    check_pool: Callable[[Any], None]
    begin_without_server: Callable[[], None]
    prefix_cache: Callable[[Any], str]


def ratio_tokens(full_tokens: int, ratio: float, page_size: int) -> int:
    """Tokens of the sliding-window pool, whole pages, where it is a share of the other pools."""
    return int(full_tokens // page_size * page_size * ratio) // page_size * page_size
