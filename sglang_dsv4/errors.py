"""Errors of the cache. Each message names the thing, what was expected, and what came."""


class CacheError(Exception):
    """Base of every error of this package that a caller may want to catch."""


class UnsupportedError(CacheError):
    """The model, the machine or an installed version cannot do what was asked."""


class OutOfPagesError(CacheError):
    """Not enough free pages or request slots; nothing was changed.

    Attributes:
        pool (str): what there is too little of: ``history pages``, ``window pages`` or ``state slots``.
        needed (int): how many must be free for all that was asked.
        free (int): how many are; ``needed - free`` more make room in this pool.
    """

    def __init__(self, message: str, pool: str, needed: int, free: int) -> None:
        super().__init__(message)
        self.pool = pool
        self.needed = needed
        self.free = free


class StalePlanError(CacheError):
    """A plan was used after the cache had moved on; nothing was changed."""


class UnknownRequestError(CacheError):
    """The request was closed, or belongs to another cache."""


class CacheInvariantError(CacheError):
    """The cache contradicts itself; the message starts with the invariant's label."""


class DamagedRequestError(CacheError):
    """An operation on the request failed half way; it can be rewound to a snapshot or closed, nothing else."""


class TruncateError(CacheError):
    """A request cannot be rolled back to that length; the message names those it can go to."""


class SavedFileError(CacheError):
    """A saved sequence cannot be read or written as asked; nothing was changed."""
