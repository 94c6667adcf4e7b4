"""``token``: who may call an endpoint. What a token is and how it is checked: ``infrastructure/serve/access.py``."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from trilobe.errors import UsageError
from trilobe.infrastructure.serve.access import FILE, Grant, create_token, list_tokens, revoke_token
from trilobe.loop.project import Project, opened, tell

_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}


def token(
    client: str = "",
    project: "Project | Path | str" = ".",
    name: str = "",
    scopes: Sequence[str] = (),
    models: Sequence[str] = (),
    max_pending: int = 0,
    expires: str = "",
    list: bool = False,
    revoke: bool = False,
    file: "Path | str" = "",
) -> "str | Sequence[Grant]":
    """Give a client a token for an endpoint, take its tokens back, or list who may do what.

    A token is shown once and kept as a digest only. With the first one the endpoint stops answering whoever has none;
    a running endpoint takes up changes within a second. A client called cn:NAME needs no token: it shows a certificate
    with that common name, signed by serve.tls_client_ca.

    Args:
        client: its name, under which its tokens are listed and taken back (an id does as well).
        project: the project's folder.
        name: the endpoint's name; the project's name by default.
        scopes: infer (ask for predictions; the default), metrics (read figures), admin (load and unload models).
        models: names of models it is held to; all of them by default.
        max_pending: requests it may have under way at once, in all workers together; 0 for any number.
        expires: when it ends, as a time from now: 12h, 90d, 1y; never by default.
        list: show who may do what, without secrets.
        revoke: take back all tokens of the client.
        file: keep the tokens in this file, without a project: for a packaged model, which finds it as a secret.

    Returns:
        The new token; with ``list`` or ``revoke`` the grants that are, or that were taken back.

    Raises:
        NotFoundError: the client has no token to take back.

    Example:
        trilobe token web --scopes infer,metrics --expires 90d
        trilobe token --list
        trilobe token web --revoke
        trilobe token web --file tokens.json
    """
    if bool(client) == list or (revoke and not client):
        raise UsageError(
            "both a client and --list" if client else "no client is named",
            expected="a client to give a token to, or --list",
            hint="trilobe token CLIENT --scopes infer",
        )
    if file:
        place = Path(file)
    else:
        with opened(project) as p:
            place = p.endpoint_folder(name or None) / FILE
    if list:
        return list_tokens(place.parent, place.name)
    if revoke:
        return revoke_token(place.parent, client, place.name)
    made = create_token(
        place.parent, client, scopes or ("infer",), models, max_pending, _time(expires), file=place.name
    )
    tell("keep it, it is shown only now" if made else f"who shows a certificate of {client[3:]!r} may come in")
    return made


def _time(expires: str) -> float | None:
    if not expires:
        return None
    if not (said := re.fullmatch(r"(\d{1,6})([mhdwy])", expires)):
        raise UsageError(f"expires = {expires!r}", expected="a time from now: 30m, 12h, 90d, 4w, 1y")
    return time.time() + int(said[1]) * _SECONDS[said[2]]
