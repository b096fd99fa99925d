"""Connectors: a port's content → rows of the backbone's width. One row of the dict per kind."""

from stages.parts.connectors.embedding import Embedding, EmbeddingConfig
from stages.parts.connectors.linear import LinearConfig, MLPConfig

ConnectorConfig = EmbeddingConfig | LinearConfig | MLPConfig

CONNECTORS: dict[str, type[EmbeddingConfig] | type[LinearConfig] | type[MLPConfig]] = {
    "embedding": EmbeddingConfig,
    "linear": LinearConfig,
    "mlp": MLPConfig,
}

__all__ = ["CONNECTORS", "ConnectorConfig", "Embedding", "EmbeddingConfig", "LinearConfig", "MLPConfig"]
