"""The JSON strategy: entities in one or several JSON files, and a journal in the same folder."""

from hf_async_store.strategies.json.files import FileManager
from hf_async_store.strategies.json.serializer import JSONSerializer
from hf_async_store.strategies.json.strategy import JSONStorageStrategy

__all__ = ["FileManager", "JSONSerializer", "JSONStorageStrategy"]
