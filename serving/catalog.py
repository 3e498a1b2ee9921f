"""What may be called by name: the base, every adapter of it in the registry, and the aliases. Reads the registry each time it is asked, so
a version is there the moment it is published."""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePath
from typing import Any

from hone.errors import CorruptAdapterError
from hone.manifest import AdapterManifest, BaseModelId
from hone.methods import HOW_SERVED
from hone.recipe.serving import EngineName
from hone.registry import Registry
from hone.tasks import TASKS, TaskName
from serving.callers import ANONYMOUS, Caller
from serving.errors import AdapterRefusedError, UnknownModelError, UnreachableError
from serving.registry_reads import nothing_known

REMEMBERED = 10_000
"""Ids."""


@dataclass(frozen=True)
class BaseDescription:
    """The base model that a server holds."""

    id: BaseModelId
    task: TaskName
    """What it does by itself."""
    max_context: int
    """Tokens of one row; 0 where it reads none."""
    created: int
    """Unix time in seconds."""
    tasks: tuple[TaskName, ...]
    """What adapters of it may be for."""
    mixed_tasks: tuple[TaskName, ...] = ()
    """Tasks whose LoRA adapters share a batch; others need a copy of the base."""
    max_copies: int = 0
    """Copies of the base that a replica keeps for adapters which share no batch."""
    engine: EngineName = "slots"
    """What makes its answers."""
    labels: tuple[str, ...] | None = None
    """Classes of the base's own trained head, if it has one."""
    published: str | None = None
    """`name@version`, where the base is a published whole model."""

    @property
    def names(self) -> list[str]:
        """Model ids of the base itself, its full name first."""
        return list(dict.fromkeys([self.published or self.id.name, PurePath(self.id.name).name]))


class Catalog:
    """Model ids of one server."""

    def __init__(self, registry: Registry, base: BaseDescription) -> None:
        self.registry = registry
        self.base = base
        self._known: OrderedDict[str, AdapterManifest] = OrderedDict()
        """What ids meant when the registry could last be read."""
        self._was_there = registry.is_there

    def find(self, model: str) -> AdapterManifest | None:
        """What a model id means right now: an adapter, or None for the base.

        An adapter goes before the base where both have the name.

        Raises:
            UnknownModelError: neither; where it is an adapter that cannot be served here, the message says why.
            AdapterRefusedError: its manifest cannot be read.
            UnreachableError: the registry cannot be read, and the id was not asked for before.
        """
        return self._checked(model, self._resolve(model))

    def known(self, model: str) -> AdapterManifest | None:
        """What a model id meant when it was last found. Reads nothing; raises as `find` does."""
        return self._checked(model, self._remembered(model))

    def _checked(self, model: str, manifest: AdapterManifest | None) -> AdapterManifest | None:
        """What the id means, where this server serves it."""
        if manifest is not None and self._is_served(manifest):
            return manifest
        if model in self.base.names or (manifest is not None and str(manifest.ref) == self.base.published):
            return None
        raise UnknownModelError(self._reason(model, manifest), "model")

    def _resolve(self, model: str) -> AdapterManifest | None:
        """An adapter by the registry, or by what it said before while it cannot be read: what is in memory goes on answering."""
        try:
            manifest = self.registry.find(model)
        except OSError:
            return self._remembered(model)
        except CorruptAdapterError as error:
            raise AdapterRefusedError(error.message, "model") from None
        if manifest is None:
            if self.registry.is_there or not self._known:
                self._known.pop(model, None)
                return None
            return self._remembered(model)
        self._known[model] = manifest
        self._known.move_to_end(model)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return manifest

    def _remembered(self, model: str) -> AdapterManifest | None:
        if model in self._known:
            return self._known[model]
        if model in self.base.names:
            return None
        raise UnreachableError("the registry cannot be read now, and this model was not asked for before; try again", "model")

    def names(self, manifest: AdapterManifest | None) -> list[str]:
        """What keys may call an adapter by, beside its aliases: `name@version`, and every version by the name; or the base's."""
        return [str(manifest.ref), manifest.name] if manifest else self.base.names

    def cards(self, caller: Caller = ANONYMOUS) -> list[dict[str, Any]]:
        """Every model id that a caller may use, as OpenAI's model object: the base, its adapters by name and version, and the aliases of
        those.

        Raises:
            UnreachableError: the registry was there before and is not: a shorter list would look as if adapters had been removed.
        """
        is_there = self.registry.is_there
        if self._was_there and not is_there:
            nothing_known()
        self._was_there = is_there
        adapters = [manifest for manifest in self.registry.adapters() if self._is_served(manifest)]
        taken = {name for manifest in adapters for name in (manifest.name, str(manifest.ref))}
        served = {str(manifest.ref): manifest for manifest in adapters}
        aliases = [(alias, served[target]) for alias, target in self.registry.aliases().items() if target in served]
        return [
            *(self.base_card(name) for name in self.base.names if name not in taken and caller.may_call(*self.base.names)),
            *(adapter_card(str(manifest.ref), manifest) for manifest in adapters if caller.may_call(*self.names(manifest))),
            *(adapter_card(alias, manifest) for alias, manifest in aliases if caller.may_call(alias, *self.names(manifest))),
        ]

    def card(self, model: str, caller: Caller = ANONYMOUS) -> dict[str, Any]:
        """The model object of one id. Raises as `find` does, and ForbiddenError where the caller may not use it."""
        manifest = self.find(model)
        caller.check(model, *self.names(manifest))
        return adapter_card(model, manifest) if manifest else self.base_card(model)

    def base_card(self, name: str) -> dict[str, Any]:
        """The base as OpenAI's model object."""
        return {
            "id": name,
            "object": "model",
            "created": self.base.created,
            "owned_by": "base",
            "task": self.base.task,
            "route": TASKS[self.base.task].route,
            "labels": list(self.base.labels) if self.base.labels else None,
            "fingerprint": self.base.id.fingerprint,
            "max_context": self.base.max_context or None,
        }

    def _is_served(self, manifest: AdapterManifest) -> bool:
        return self._is_of_base(manifest) and manifest.task in self.base.tasks and (self._is_mixed(manifest) or self.base.max_copies > 0)

    def _is_of_base(self, manifest: AdapterManifest) -> bool:
        return manifest.kind == "adapter" and manifest.base.fingerprint == self.base.id.fingerprint

    def _is_mixed(self, manifest: AdapterManifest) -> bool:
        return manifest.served == "mixed" and manifest.task in self.base.mixed_tasks

    def _reason(self, model: str, manifest: AdapterManifest | None) -> str:
        shown = model if len(model) <= 200 else f"{model[:200]}..."
        if manifest is None:
            return f"no model {shown!r} here; GET /v1/models lists those there are"
        if manifest.kind == "full":
            return f"{manifest.ref} is a whole model of its own, and this server serves {self.base.names[0]}; serve it as a base"
        if self._is_of_base(manifest) and manifest.task not in self.base.tasks:
            return f"{manifest.ref} is for {manifest.task}, and this server serves {self.base.names[0]} for {', '.join(self.base.tasks)}"
        if self._is_of_base(manifest):
            how = HOW_SERVED[manifest.served if manifest.served != "mixed" else "merged"]
            if self.base.engine == "vllm":
                return (
                    f"{manifest.ref} is served {how}, and engine vllm keeps no copies; serve its base with --engine slots, or "
                    f"`hone export {manifest.ref} --format merged` it and serve that folder as a base"
                )
            return f"{manifest.ref} is served {how}, and this server keeps no copies; start it with max_copies of at least 1"
        here, there = self.base.id, manifest.base
        return (
            f"{manifest.ref} is an adapter of {there.name} ({there.fingerprint[:12]}), and this server serves "
            f"{self.base.names[0]} ({here.fingerprint[:12]}); call the server of its base"
        )


def adapter_card(model: str, manifest: AdapterManifest) -> dict[str, Any]:
    """An adapter as OpenAI's model object, with its lineage riding along."""
    return {
        "id": model,
        "object": "model",
        "created": int(datetime.fromisoformat(manifest.created_at).timestamp()),
        "owned_by": "hone",
        "adapter": str(manifest.ref),
        "digest": manifest.digest,
        "task": manifest.task,
        "route": TASKS[manifest.task].route,
        "method": manifest.method,
        "served": manifest.served,
        "labels": manifest.labels,
        "problem_type": manifest.problem_type,
        "metrics": manifest.metrics,
        "parent": manifest.base.model_dump(),
        "lineage": manifest.lineage.model_dump(),
    }
