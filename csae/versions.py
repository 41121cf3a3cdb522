"""What this distribution is called, and which versions of other libraries it was tested with.

The rule, for every library that csae uses. The tested range is what pyproject.toml declares; it is read from the
installed metadata and compared where the library is used. A version below it is refused: names that csae needs are
missing there. One above it is warned of, once: nobody has tested it, and what csae does inside other libraries (hooks,
caches, patches) is checked at run time. A development version (2.16.0a0+git, a nightly) counts as the release that it
leads to, and a local suffix (+cpu) does not count. Where csae runs from a checkout that was never installed, there is
no metadata, and nothing is compared.
"""

from __future__ import annotations

import functools
import sys
import warnings
from importlib import import_module, metadata
from importlib.metadata import PackageMetadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from csae.errors import UserError

# On PyPI the name csae belongs to another project, whose package has a folder csae too.
DISTRIBUTION = "contextual-sae"
IMPORTED_AS = "csae"


class VersionError(UserError, ImportError):
    """A library is older than csae needs, or another project's package has overwritten this one."""


class UntestedVersion(RuntimeWarning):
    """A library is newer than csae was tested with, or another project's package lies in the folder of this one."""


def pip_install(extra: str | None = None) -> str:
    """The command that installs csae, with the dependencies of `extra` where one is given."""
    return f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install {DISTRIBUTION}"


@functools.cache
def check(library: str) -> None:
    """Compare the installed version of `library`, a distribution's name, with the range that csae was tested with.

    Older: VersionError (a UserError and an ImportError). Newer: an UntestedVersion warning, the first time.
    """
    found = out_of_range(library)
    if found is None:
        return
    line, too_old = found
    if too_old:
        raise VersionError(line)
    _warn(line)


def out_of_range(library: str) -> tuple[str, bool] | None:
    """What is wrong with the installed version of `library` in one line, and whether it is too old; None: nothing,
    or the library, its version or its range is not known."""
    tested, installed = _tested().get(canonicalize_name(library)), _installed(library)
    if tested is None or installed is None:
        return None
    try:
        release = Version(Version(installed).base_version)
    except InvalidVersion:
        return None
    if release in tested:
        return None
    too_old = any(release not in SpecifierSet(str(bound)) for bound in tested if bound.operator in (">=", ">"))
    what = "older than csae needs" if too_old else "newer than csae was tested with"
    wanted = ",".join(sorted(map(str, tested), reverse=True))
    return f"{library} {installed} is {what}: pip install '{library}{wanted}'", too_old


def other_package() -> str | None:
    """What is wrong, in one line, where a distribution of the name csae is installed beside this one; else None."""
    try:
        other = metadata.metadata(IMPORTED_AS)
    except metadata.PackageNotFoundError:
        return None
    whose = "this project's former name" if _is_former(other) else "another project's package"
    return (
        f"{IMPORTED_AS} {other['Version']} ({whose}) shares the folder {IMPORTED_AS} with {DISTRIBUTION}: run "
        f"`pip uninstall {IMPORTED_AS}`, then `pip install --force-reinstall --no-deps {DISTRIBUTION}`"
    )


@functools.cache
def check_name() -> None:
    """Compare with another project's distribution csae, whose files go into the folder of this one.

    Beside this one: an UntestedVersion warning, the first time. Where its `__init__` has taken the place of this
    one's, or took it along when it was uninstalled: VersionError.
    """
    line = other_package()
    if line is not None and _is_former(metadata.metadata(IMPORTED_AS)):
        line = None
    if not hasattr(import_module(IMPORTED_AS), "_HOMES"):
        gone = f"{IMPORTED_AS}/__init__.py is not this project's: another project's package {IMPORTED_AS} was there"
        raise VersionError(line or f"{gone}; run `pip install --force-reinstall --no-deps {DISTRIBUTION}`")
    if line is not None:
        _warn(line)


def _is_former(other: PackageMetadata) -> bool:
    """Whether a distribution of the name csae is this project's own, from before it was renamed."""
    return "contextual SAE" in (other["Summary"] or "")


@functools.cache
def _tested() -> dict[str, SpecifierSet]:
    """The range of each library that csae declares."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    requirements = map(Requirement, declared)
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in requirements}


def _installed(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:  # a build that was put on the path by hand
        return getattr(sys.modules.get(library.replace("-", "_")), "__version__", None)


def _warn(line: str) -> None:
    # Without a line of source code below it: it says nothing of where the library is used.
    warnings.warn_explicit(line, UntestedVersion, "csae", 0)
