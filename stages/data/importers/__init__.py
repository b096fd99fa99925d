"""Raw data sets and how they become samples: name -> importer. What an importer is, and what it gives, stands in `raw`."""

from collections.abc import Callable

from stages.data.importers import folder, openmoji, scenes, shards
from stages.data.importers.raw import RawData

IMPORTERS: dict[str, Callable[..., RawData]] = {
    "scenes": scenes.samples,
    "folder": folder.samples,
    "shards": shards.samples,
    "openmoji": openmoji.samples,
}
