"""Connectors: a port's content → rows of the backbone's width. One row of the dict per kind."""

from stages.parts.connectors.convnext import ConvNeXtConfig
from stages.parts.connectors.dual_path import DualPathConfig
from stages.parts.connectors.embedding import Embedding, EmbeddingConfig, EmbeddingMLPConfig
from stages.parts.connectors.linear import LinearConfig, MLPConfig

ConnectorConfig = EmbeddingConfig | EmbeddingMLPConfig | LinearConfig | MLPConfig | DualPathConfig | ConvNeXtConfig

CONNECTORS: dict[str, type[ConnectorConfig]] = {
    "embedding": EmbeddingConfig,
    "embedding-mlp": EmbeddingMLPConfig,
    "linear": LinearConfig,
    "mlp": MLPConfig,
    "dual-path": DualPathConfig,
    "convnext": ConvNeXtConfig,
}

__all__ = ["CONNECTORS", "ConnectorConfig", "Embedding", "EmbeddingConfig", "EmbeddingMLPConfig", "LinearConfig", "MLPConfig"]
