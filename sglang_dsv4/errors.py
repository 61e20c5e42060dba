"""Errors of the cache. Each message names the thing, what was expected, and what came."""


class CacheError(Exception):
    """Base of every error of this package that a caller may want to catch."""


class UnsupportedError(CacheError):
    """The model, the machine or an installed version cannot do what was asked."""


class OutOfPagesError(CacheError):
    """Not enough free pages or request slots for a plan; nothing was changed."""


class StalePlanError(CacheError):
    """A plan was used after the cache had moved on; nothing was changed."""


class UnknownRequestError(CacheError):
    """The request was closed, or belongs to another cache."""


class CacheInvariantError(CacheError):
    """The cache contradicts itself; the message starts with the invariant's label."""


class TruncateError(CacheError):
    """A request cannot be rolled back to that length; the message names those it can go to."""


class SavedFileError(CacheError):
    """A saved sequence cannot be read or written as asked; nothing was changed."""
