"""The JSON strategy: entities in JSON files, one or several, with a journal beside them."""

from hf_async_store.strategies.json.files import FileManager
from hf_async_store.strategies.json.serializer import JSONSerializer
from hf_async_store.strategies.json.strategy import JSONStorageStrategy

__all__ = ["FileManager", "JSONSerializer", "JSONStorageStrategy"]
