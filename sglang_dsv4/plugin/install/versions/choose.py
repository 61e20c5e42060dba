"""Which of the versions is installed."""

import functools
from importlib import metadata

from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install.versions import probes
from sglang_dsv4.plugin.install.versions.interface import SGLangVersion
from sglang_dsv4.plugin.install.versions.v0_5_17 import V0_5_17
from sglang_dsv4.plugin.install.versions.v0_5_23 import V0_5_23

SERVED = (V0_5_17, V0_5_23)


def distribution() -> str | None:
    """SGLang's version as its package names it; None where it is not installed."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def installed() -> SGLangVersion:
    """The version whose answers the early probes give; the same for the life of a process.

    Raises:
        UnsupportedError: none gives them; names the probe.
    """
    return choose(probes.ask(probes.EARLY), SERVED)


def choose(answers: dict[str, bool | str], among: tuple[SGLangVersion, ...]) -> SGLangVersion:
    """The first version that gives these answers.

    Raises:
        UnsupportedError: none does; names the probe on which the nearest one differs.
    """
    differences = {version: [name for name in answers if answers[name] != version.answers[name]] for version in among}
    nearest = min(among, key=lambda version: len(differences[version]))
    if differences[nearest]:
        found = "; ".join(f"{name}: {answers[name]}" for name in differences[nearest])
        raise UnsupportedError(
            f"sglang: expected version {_numbers()}, got {distribution() or 'none'}, which differs in: {found}"
        )
    return nearest


def check_installed() -> SGLangVersion:
    """`installed`, when all probes have been asked, and the version is one that was checked.

    Raises:
        UnsupportedError: names the version, and the probes that gave another answer.
    """
    found = distribution()
    if found is None:
        raise UnsupportedError(f"sglang: expected version {_numbers()}, got none")
    version = choose(probes.ask(probes.EARLY | probes.LATE), SERVED)
    if found != version.number:
        raise UnsupportedError(f"sglang: expected version {_numbers()}, got {found}")
    return version


def _numbers() -> str:
    return " or ".join(version.number for version in SERVED)
