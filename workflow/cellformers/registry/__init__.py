"""Published models and vocabularies: what is registered, and getting it.

    folder = download("geneformer-v2-104m")           # a model directory in the cache, fetched if need be
    folder = find_model("geneformer-v2-104m")         # the same, without network; or any folder

The cache is CELLFORMERS_HOME, else ~/.cache/cellformers (XDG_CACHE_HOME is honoured); HF_ENDPOINT names another Hub,
HF_TOKEN is sent to it; with CELLFORMERS_OFFLINE or HF_HUB_OFFLINE set, nothing is fetched.
"""

from cellformers.registry.entries import (
    PublishedModel,
    PublishedVocabulary,
    Registry,
    RemoteFile,
    read_registry,
)
from cellformers.registry.obtain import download, find_model
from cellformers.registry.store import home

__all__ = [
    "PublishedModel",
    "PublishedVocabulary",
    "Registry",
    "RemoteFile",
    "download",
    "find_model",
    "home",
    "read_registry",
]
