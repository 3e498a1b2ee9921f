"""Every error hone raises on purpose.

    HoneError
    ├── RecipeError          a recipe key, value or override
    ├── DataError            a data file or its rows
    ├── BaseModelError       a base model folder or hub name
    ├── RegistryError        publishing, aliases, removal
    │   ├── UnknownAdapterError
    │   ├── CorruptAdapterError
    │   └── GateError        publish.gate has something against a version
    ├── ResourceError        workers, ports, disk, a cluster out of reach
    └── RunFailedError       a run that ended without a result

Each message is a single sentence (or one line per bad row) saying what is wrong, where, and what to do. All take only that
message, so they survive pickling on their way back from a Ray worker.
"""


class HoneError(Exception):
    """Something the user can act on. The command line prints the message alone and exits 1; HTTP maps it in one place."""

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__


class RecipeError(HoneError):
    """A recipe that cannot be read or does not make sense."""


class DataError(HoneError):
    """A data file that is missing, unreadable, or holds bad rows."""


class BaseModelError(HoneError):
    """A base model that is not there, not safe to load, or does not fit the task."""


class RegistryError(HoneError):
    """An operation on the registry that cannot be done."""


class UnknownAdapterError(RegistryError):
    """No adapter, version or alias of that name."""


class CorruptAdapterError(RegistryError):
    """A published file whose bytes no longer match the manifest."""


class GateError(RegistryError):
    """A version that its recipe's `publish.gate` lets no alias move to."""


class ResourceError(HoneError):
    """The machine or cluster cannot give what was asked for."""


class RunFailedError(HoneError):
    """A run that stopped without a result, with the reason that its workers gave."""
