"""Views: how a picture becomes what an encoder or an autoencoder is shown. One row of the dict per kind."""

from stages.parts.views.square import PadConfig, SquareConfig

ViewConfig = SquareConfig | PadConfig

VIEWS: dict[str, type[SquareConfig] | type[PadConfig]] = {"square": SquareConfig, "pad": PadConfig}

__all__ = ["VIEWS", "PadConfig", "SquareConfig", "ViewConfig"]
