"""Collects the sites' results of one task as they arrive."""

import threading
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from nvflare.app_common.abstract.fl_model import FLModel

from fedsft_assets.federation.protocol.site_messages import failure_of
from fedsft_assets.federation.server.liveness import SiteWatch

T = TypeVar("T")


class TaskResults(Generic[T]):
    """`take` converts a site's result; if it raises ValueError, `refuse` is called and the site is excluded.

    Thread-safe.
    """

    def __init__(
        self,
        take: Callable[[str, FLModel], T],
        watch: SiteWatch,
        refuse: Callable[[str, ValueError], None],
    ) -> None:
        self._take, self._watch, self._refuse = take, watch, refuse
        self._lock = threading.Lock()
        self._taken: dict[str, T] = {}
        self.errors: list[Exception] = []
        """Other errors raised by `take`; NVFlare would only log errors raised in a callback."""

    def __len__(self) -> int:
        return len(self._taken)

    def receive(self, result: FLModel) -> None:
        """NVFlare's callback for a site's result."""
        with self._lock:
            site = result.meta["client_name"]
            self._watch.heard(site)
            if site in self._watch.refused:
                return
            try:
                if failure := failure_of(result.meta):
                    self._watch.failed(site, failure)
                    return
                self._taken[site] = self._take(site, result)
            except ValueError as error:
                self._refuse(site, error)
                return
            except Exception as error:
                self.errors.append(error)
                return
            result.params = None
            self._watch.done(site)

    def close(self, compare: Callable[[Mapping[str, T]], dict[str, str]], at_least: int, what: str) -> dict[str, T]:
        """Results by site, sorted, without refused sites.

        If there are `at_least` results, `compare` returns sites that disagree with the others, with the reason; they
        are refused. Raises the first error of `take`, and ValueError prefixed with `what` if no majority agrees.
        """
        with self._lock:
            if self.errors:
                raise self.errors[0]
            if len(self._taken) >= at_least:
                try:
                    odd = compare(self._taken)
                except ValueError as error:
                    raise ValueError(f"{what}: {error}") from error
                for site, why in odd.items():
                    self._watch.refuse(site, why)
            refused = self._watch.refused
            return {site: taken for site, taken in sorted(self._taken.items()) if site not in refused}
