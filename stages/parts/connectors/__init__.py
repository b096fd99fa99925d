"""Connectors: a port's content → rows of the backbone's width. One row of the dict per kind."""

from stages.parts.connectors.embedding import Embedding, EmbeddingConfig, EmbeddingMLPConfig
from stages.parts.connectors.linear import LinearConfig, MLPConfig

ConnectorConfig = EmbeddingConfig | EmbeddingMLPConfig | LinearConfig | MLPConfig

CONNECTORS: dict[str, type[EmbeddingConfig] | type[EmbeddingMLPConfig] | type[LinearConfig] | type[MLPConfig]] = {
    "embedding": EmbeddingConfig,
    "embedding-mlp": EmbeddingMLPConfig,
    "linear": LinearConfig,
    "mlp": MLPConfig,
}

__all__ = ["CONNECTORS", "ConnectorConfig", "Embedding", "EmbeddingConfig", "EmbeddingMLPConfig", "LinearConfig", "MLPConfig"]
