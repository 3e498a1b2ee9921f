"""On whose behalf a request runs. Crosses from the ingress to a replica with every call."""

from dataclasses import dataclass

from hone.keys import EVERY_MODEL, ApiKey, Scope, matches
from serving.engine.fairness import EVERYONE, Tenant
from serving.errors import ForbiddenError


@dataclass(frozen=True)
class Caller:
    """The holder of a key, or whoever came without one where that is let in."""

    key: str
    """Id of the key."""
    label: str
    """`project/name` of the key."""
    tenant: Tenant
    """Whose turn it is in the engine: the key's project, which pays for each request by the weight of the key that sent it."""
    scopes: tuple[Scope, ...]
    models: tuple[str, ...]
    """Patterns of what it may call."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @classmethod
    def of(cls, key: ApiKey) -> "Caller":
        limits = key.requests_per_minute, key.tokens_per_minute
        return cls(key.id, key.label, Tenant(key.project, key.weight), key.scopes, key.adapters, *limits)

    def has(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    def may_call(self, *names: str) -> bool:
        """Whether it may call what has these names: what was asked for, and what that means right now."""
        return matches(self.models, names)

    def check(self, asked: str, *names: str) -> None:
        """Raises ForbiddenError where it may not call what `asked` means, which has `names`."""
        if not self.may_call(asked, *names):
            raise ForbiddenError(f"this key may not call {asked!r}; GET /v1/models lists what it may", "model", "model_not_allowed")


ANONYMOUS = Caller("anonymous", "anonymous", EVERYONE, ("admin",), EVERY_MODEL)
"""Whoever needs no key."""
