"""A dense model as a mixture of experts: each MLP copied into every expert (Komatsuzaki et al. 2022, "upcycling").

Where the weights of a token's experts sum to 1, equal experts give what one gives, so the mixture computes the dense
model whatever its routers choose. That is an exact check of a mixture on real weights, and where training would start.

Shapes: E experts, M hidden.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..spec.config import LayerConfig, ModelConfig
from ..spec.errors import ConfigError
from ..spec.moe import MoeConfig, RouterConfig, Score
from ..spec.shard import Shard, layer_slices
from ..spec.weights import (
    EmbeddingWeights,
    ExpertWeights,
    HeadWeights,
    LayerWeights,
    LinearWeights,
    MoeWeights,
    StackedLinearWeights,
    WeightSource,
    sliced,
)


class Upcycled:
    """The weights of a dense model, every MLP as experts behind a router drawn from a seed.

    Raises `ConfigError` for a model that has experts already, or a router whose weights need not sum to 1.
    """

    def __init__(self, source: WeightSource, router: RouterConfig, seed: int = 0) -> None:
        sums = router.renormalize or router.score is Score.SOFTMAX_OF_CHOSEN
        if not sums or router.scale != 1:
            raise ConfigError(
                f"the router's score is {router.score.value}, renormalize {router.renormalize} and scale "
                f"{router.scale}; for equal experts to be the dense MLP, a token's weights must sum to 1"
            )
        for index, layer in enumerate(source.config.layers):
            if isinstance(layer.mlp, MoeConfig):
                raise ConfigError(
                    f"layer {index} has {layer.mlp.router.experts} experts already; only dense models are upcycled"
                )
        self._source, self._router, self._seed = source, router, seed
        self.config: ModelConfig = replace(
            source.config, layers=tuple(self._config_of(layer) for layer in source.config.layers)
        )

    def embedding(self, shard: Shard | None = None) -> EmbeddingWeights:
        return self._source.embedding(shard)

    def layer(self, index: int, shard: Shard | None = None) -> LayerWeights:
        whole, router = self._source.layer(index), self._router
        mlp, hidden = whole.dense_mlp, self.config.hidden
        generator = torch.Generator().manual_seed(self._seed + index)
        weight_NI = torch.randn(router.experts, hidden, generator=generator, dtype=torch.float32) / hidden**0.5
        zero_E = torch.zeros(router.experts, dtype=torch.float32)
        experts = ExpertWeights(
            up=self._copied(mlp.up),
            down=self._copied(mlp.down),
            gate=None if mlp.gate is None else self._copied(mlp.gate),
        )
        mixture = MoeWeights(
            router=LinearWeights(weight_NI=weight_NI, bias_N=zero_E if router.logit_bias else None),
            experts=experts,
            choice_bias_E=zero_E if router.choice_bias else None,
        )
        layer = replace(whole, mlp=mixture)
        return layer if shard is None else sliced(layer, layer_slices(self.config, index, shard))

    def head(self, shard: Shard | None = None) -> HeadWeights:
        return self._source.head(shard)

    def _config_of(self, layer: LayerConfig) -> LayerConfig:
        return replace(layer, mlp=MoeConfig(router=self._router, expert=layer.dense_mlp))

    def _copied(self, weights: LinearWeights) -> StackedLinearWeights:
        """Repeat a linear map for every expert, without copying its numbers."""

        def each(tensor: Tensor) -> Tensor:
            return tensor.expand(self._router.experts, *tensor.shape)

        bias_EN = None if weights.bias_N is None else each(weights.bias_N)
        return StackedLinearWeights(weight_ENI=each(weights.weight_NI), bias_EN=bias_EN)
