"""Connectors: a port's content → rows of the backbone's width. One row of the dict per kind."""

from stages.parts.config import PartConfig
from stages.parts.connectors.convnext import ConvNeXtConfig
from stages.parts.connectors.dual_path import DualPathConfig
from stages.parts.connectors.embedding import Embedding, EmbeddingConfig, EmbeddingMLPConfig
from stages.parts.connectors.linear import LinearConfig, MLPConfig
from stages.parts.connectors.masked import MaskedEncoder, MaskedEncoderConfig
from stages.parts.connectors.scales import EmbeddingScalesConfig
from stages.parts.connectors.transformer import TransformerConnectorConfig

CONNECTORS: dict[str, type[PartConfig]] = {
    "embedding": EmbeddingConfig,
    "embedding-mlp": EmbeddingMLPConfig,
    "embedding-scales": EmbeddingScalesConfig,
    "linear": LinearConfig,
    "masked-encoder": MaskedEncoderConfig,
    "mlp": MLPConfig,
    "dual-path": DualPathConfig,
    "convnext": ConvNeXtConfig,
    "transformer": TransformerConnectorConfig,
}

__all__ = [
    "CONNECTORS",
    "Embedding",
    "EmbeddingConfig",
    "EmbeddingMLPConfig",
    "EmbeddingScalesConfig",
    "LinearConfig",
    "MLPConfig",
    "MaskedEncoder",
    "MaskedEncoderConfig",
    "TransformerConnectorConfig",
]
