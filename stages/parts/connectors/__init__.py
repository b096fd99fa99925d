"""Connectors: a port's content → rows of the backbone's width. One row of the dict per kind."""

from stages.parts.connectors.embedding import Embedding, EmbeddingConfig, EmbeddingMLPConfig
from stages.parts.connectors.linear import LinearConfig, MLPConfig
from stages.parts.connectors.masked import MaskedEncoder, MaskedEncoderConfig

ConnectorConfig = EmbeddingConfig | EmbeddingMLPConfig | LinearConfig | MLPConfig | MaskedEncoderConfig

CONNECTORS: dict[str, type[ConnectorConfig]] = {
    "embedding": EmbeddingConfig,
    "embedding-mlp": EmbeddingMLPConfig,
    "linear": LinearConfig,
    "mlp": MLPConfig,
    "masked-encoder": MaskedEncoderConfig,
}

__all__ = [
    "CONNECTORS",
    "ConnectorConfig",
    "Embedding",
    "EmbeddingConfig",
    "EmbeddingMLPConfig",
    "LinearConfig",
    "MLPConfig",
    "MaskedEncoder",
    "MaskedEncoderConfig",
]
