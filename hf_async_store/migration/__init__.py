"""Migration between engines, backup and restore, built on the public methods of the stores."""

from __future__ import annotations

from hf_async_store.migration.backup import BackupResult, backup_store
from hf_async_store.migration.backup_format import is_portable, read_header, read_portable
from hf_async_store.migration.backup_verification import check_portable
from hf_async_store.migration.copier import MigrationBatch
from hf_async_store.migration.diff import (
    CollectionComparison,
    Comparison,
    Difference,
    compare_stores,
)
from hf_async_store.migration.digest import Digest
from hf_async_store.migration.merge import Merged, MergeRule
from hf_async_store.migration.restore import RestoreResult, restore_store
from hf_async_store.migration.store_checks import location_of, require_store
from hf_async_store.migration.tool import CollectionReport, MigrationReport, MigrationTool

__all__ = [
    "BackupResult",
    "CollectionComparison",
    "CollectionReport",
    "Comparison",
    "Difference",
    "Digest",
    "MergeRule",
    "Merged",
    "MigrationBatch",
    "MigrationReport",
    "MigrationTool",
    "RestoreResult",
    "backup_store",
    "check_portable",
    "compare_stores",
    "is_portable",
    "location_of",
    "read_header",
    "read_portable",
    "require_store",
    "restore_store",
]
