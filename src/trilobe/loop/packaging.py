"""What ``package`` does with a bundle that is whole: sign it, list its parts, write it as an image, for clusters."""

from pathlib import Path

from trilobe.errors import NotFoundError, UsageError
from trilobe.infrastructure.bundle import open_bundle, read_json
from trilobe.loop.project import Project, opened, tell
from trilobe.types import Bundle


def packaged(bundle: str, project: "Project | Path | str") -> Bundle:
    """A bundle that was packaged before: at a path, for which no project is needed, or by its id in the project.

    Raises :class:`~trilobe.errors.BundleError` for a damaged one, :class:`~trilobe.errors.NotFoundError` for none.
    """
    if Path(bundle).is_dir():
        return open_bundle(Path(bundle))
    with opened(project) as p:
        return open_bundle(p.store.bundle(bundle).path)


def expect_deliverable(oci: str, base: str, packages: bool, sign: str) -> None:
    """Find what cannot work before the work of checking a model begins.

    >>> expect_deliverable("", "base", False, "")
    Traceback (most recent call last):
    trilobe.errors.UsageError: --base without --oci; expected --oci PATH, the image to write
    """
    for option, given, needs, there, why in (
        ("--base", base, "--oci", oci, "the image to write"),
        ("--packages", packages, "--base", base, "the image that has Python"),
    ):
        if given and not there:
            raise UsageError(f"{option} without {needs}", expected=f"{needs} PATH, {why}")
    for what, path in (("image", base), ("key", sign)):
        if path and not Path(path).exists():
            raise NotFoundError(f"there is no {what} at {path}", expected="a path that exists")


def deliver(bundle: Bundle, oci: str, base: str, packages: bool, sbom: str, kubernetes: str, sign: str) -> None:
    """Write whatever was asked for by a path; the signature first, so that an image holds it."""
    if sign:
        from trilobe.infrastructure.packaging.signing import sign as sign_bundle

        tell(f"signed: {sign_bundle(bundle.path, Path(sign))}")
    if sbom:
        from trilobe.files import write_atomically
        from trilobe.infrastructure.packaging.sbom import sbom_json

        write_atomically(Path(sbom), sbom_json(bundle))
        tell(f"bill of materials: {sbom}")
    if kubernetes:
        from trilobe.infrastructure.packaging.kubernetes import write_manifests

        tell("for clusters: " + ", ".join(map(str, write_manifests(bundle, Path(kubernetes)))))
    if oci:
        from trilobe.infrastructure.packaging.image import write_bundle

        digest = write_bundle(bundle, Path(oci), Path(base) if base else None, packages)
        tell(f"image {digest} in {oci}")
        if not base:
            tell("without a base it holds no Python: build upon it")
    encoder = read_json(bundle, "preprocessing.json").get("encoder")
    if encoder and (oci or kubernetes):
        tell(f"it runs only where the encoder {encoder!r} and the extra 'text' are: they are not in a bundle")
