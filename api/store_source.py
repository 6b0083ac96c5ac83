"""A store in the place of a model's weights."""

from typing import TYPE_CHECKING, NoReturn

from twinfer.spec.config import ModelConfig
from twinfer.spec.errors import RequestError
from twinfer.spec.shard import Shard

if TYPE_CHECKING:
    from twinfer.offload.shares import Shares
    from twinfer.offload.store import Store


class StoreSource:
    """A `WeightSource` in name: what a store holds is prepared already, and is streamed as it is."""

    def __init__(self, store: "Store | Shares", config: ModelConfig) -> None:
        self.store = store
        self.config = config

    def embedding(self, shard: Shard | None = None) -> NoReturn:
        self._refuse()

    def layer(self, index: int, shard: Shard | None = None) -> NoReturn:
        self._refuse()

    def head(self, shard: Shard | None = None) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise RequestError(f"{self.store.folder} is a store, which is only streamed; give the model it was built from")
