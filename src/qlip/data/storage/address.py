"""Addresses without their secrets: what datasets store and messages show."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import parse_qsl, urlencode, urlsplit

_SIGNATURE = re.compile(r"x-(amz|goog)-.*|awsaccesskeyid|googleaccessid|key-pair-id|policy|signature|expires", re.I)
"""Query parameters of presigned addresses of S3, Google Cloud and CloudFront."""
_AZURE = frozenset("sv ss srt sp se st spr sig sr sip si sdd skt ske sks skv skoid sktid".split())
"""Query parameters of a shared access signature; its ``sig`` tells that they are one."""
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.I)


def public_address(address: str) -> str:
    """Return an address without user, password, query and fragment.

    A query that is not only a signature tells images apart (``/image?id=5``): twelve digits of its SHA-256 take its
    place, so that equal addresses stay equal. A new signature gives the same address. Paths stay as they are.
    """
    scheme, mark, rest = address.partition("://")
    if not mark or scheme == "file":
        return address
    rest, _, query = rest.partition("#")[0].partition("?")
    host, slash, path = rest.partition("/")
    shown = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    fields = parse_qsl(query, keep_blank_values=True)
    names = {name.lower() for name, _ in fields}
    signed = {name for name in names if _SIGNATURE.fullmatch(name)} if any("signature" in n for n in names) else set()
    signed |= _AZURE if "sig" in names else set()
    kept = [(name, value) for name, value in fields if name.lower() not in signed]
    return f"{shown}?{hashlib.sha256(urlencode(kept).encode()).hexdigest()[:12]}" if kept else shown


def without_secrets(text: str) -> str:
    """Return a message with every address in it as `public_address` shows it."""
    return _ADDRESS.sub(lambda found: _public(found.group()), text)


def is_malformed(address: str) -> bool:
    """Return whether an address has no host, or one that cannot be parsed: ``http://[::1/x``.

    An IPv6 host counts too, since fsspec cuts addresses at ``::``.
    """
    try:
        return not urlsplit(address).hostname or "::" in urlsplit(address).netloc
    except ValueError:
        return True


def _public(found: str) -> str:
    """Return the public form of an address in a sentence, whose punctuation is kept."""
    address = found.rstrip(":;,.)")
    return public_address(address) + found[len(address) :]
