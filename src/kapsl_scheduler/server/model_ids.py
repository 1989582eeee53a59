"""Numbers for models that are named: Kapsl's protocols ask for model 7, everything else for `digits`.

The one place that says which number is whose. What is not here: which models are loaded (`runtime.registry`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from kapsl_scheduler.errors import InvalidInput, ModelNotLoaded

__all__ = ["MAX_ID", "ModelIds"]

MAX_ID: Final = 2**32 - 1


class ModelIds:
    """Every model that was assigned an id keeps it for as long as it is known, loaded or not.

    A model has the id that is `configured` for its name, the one that was asked for when it came, or else the next: 0
    for the first, and none that was counted out before, so that nobody reaches a model that came in the place of
    another. Raises `ValueError` where two names are configured for one id.
    """

    def __init__(self, configured: Mapping[str, int] | None = None) -> None:
        self._configured = dict(configured or {})
        self._ids: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._next = 0
        owners: dict[int, str] = {}
        for name, id in self._configured.items():
            if id in owners:
                raise ValueError(f"expected an id for each model, got {id} for {owners[id]!r} and for {name!r}")
            owners[id] = name
        self._owners = owners

    def assign(self, name: str, wanted: int | None = None) -> int:
        """The id of a model from now on; the same as before if it has one. Raises `InvalidInput` where it cannot be the
        `wanted` one, which then is somebody else's, or where the model has another."""
        known = self._ids.get(name, self._configured.get(name))
        if wanted is not None and wanted != known:
            owner = self._names.get(wanted, self._owners.get(wanted))
            if known is not None:
                raise InvalidInput(f"model_id: {wanted} came, and model {name!r} has the id {known}")
            if owner is not None:
                raise InvalidInput(f"model_id: {wanted} is the id of model {owner!r}, expected one that is free")
            known = wanted
        if known is None:
            while self._next in self._names or self._next in self._owners:
                self._next += 1
            known = self._next
            self._next += 1
        self._ids[name] = known
        self._names[known] = name
        return known

    def of(self, name: str) -> int:
        """The id of a model that was assigned one. Raises `ModelNotLoaded`."""
        id = self._ids.get(name)
        if id is None:
            raise ModelNotLoaded(f"model {name!r} has no id")
        return id

    def name(self, id: int) -> str:
        """Whose id it is. Raises `ModelNotLoaded`, in the original's words."""
        name = self._names.get(id)
        if name is None:
            raise ModelNotLoaded(f"Model {id} not found")
        return name

    def names(self) -> list[str]:
        """All models that have an id, in the order of their ids."""
        return [self._names[id] for id in sorted(self._names)]

    def release(self, name: str) -> None:
        """The model has never come, and nobody has heard of its id: it may be counted out again."""
        id = self._ids.pop(name)
        del self._names[id]
        if id == self._next - 1:
            self._next = id

    def forget(self, name: str) -> None:
        """The model is gone for good."""
        self._names.pop(self._ids.pop(name, -1), None)
