"""What all routes share: the models that are served, the store, and whether we are ready."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import InputError
from ..storage import Store
from .errors import NotServed, Stopping
from .settings import Settings

if TYPE_CHECKING:
    from .metrics import Metrics
    from .served import ServedModel


@dataclass
class Service:
    """One running service.

    Attributes
    ----------
    settings
        As given at the start.
    models
        By name, filled by the warm-up.
    metrics
        What /metrics shows.
    store
        Opened once; None where no store is shown.
    state
        "starting", then "ready", then "draining".
    """

    settings: Settings
    metrics: Metrics
    models: dict[str, ServedModel] = field(default_factory=dict)
    store: Store | None = None
    state: str = "starting"

    def model(self, name: str | None = None) -> ServedModel:
        """A model on the list; the default one where no name is given.

        Raises NotServed for another name, Stopping before warm-up and while draining.
        """
        wanted = self.settings.default_model if name is None else name
        if wanted not in self.settings.models:
            served = ", ".join(self.settings.models)
            raise NotServed(f"no model `{wanted:.100}` is served here; there is: {served}.")
        if self.state != "ready":
            raise Stopping(f"the service is {self.state}; ask again in a moment.")
        return self.models[wanted]

    def tables(self) -> Store:
        """The store on show; raises NotServed where there is none."""
        if self.store is None:
            raise NotServed("this service shows no store; start it with --store URI.")
        return self.store


def open_store(settings: Settings) -> Store | None:
    """The store of the settings, which must exist.

    Raises InputError for a local folder that is not there: a typing error would show an empty one.
    """
    if settings.store is None:
        return None
    opened = Store(settings.store)
    if "://" not in settings.store:
        from pathlib import Path

        if not Path(settings.store).is_dir():
            raise InputError(f"no store at {settings.store}. Check --store, or run a recipe first.")
    return opened
