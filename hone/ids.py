"""Names of things: adapters (`support-bot@3`) and runs (`support-bot-20261121-073000-1f0c`)."""

import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from hone.errors import RegistryError

NAME_PATTERN = r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?"
"""Names are used as folder names, URL parts and Kubernetes labels, so they are lower case and at most 64 characters."""


@dataclass(frozen=True, order=True)
class AdapterRef:
    """`name@version` of one immutable published adapter; `version` is None where the latest is meant."""

    name: str
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> "AdapterRef":
        """Read `name` or `name@version`.

        Raises:
            RegistryError: the text is neither.
        """
        match = re.fullmatch(rf"({NAME_PATTERN})(?:@([1-9][0-9]{{0,8}}))?", text)
        if match is None:
            raise RegistryError(f"{text!r} is not an adapter reference; write NAME or NAME@VERSION, such as support-bot@3")
        return cls(match[1], int(match[2]) if match[2] else None)

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def new_run_id(name: str) -> str:
    """A run id that sorts by start time and is unique across machines."""
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
