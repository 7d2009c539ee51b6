"""Files on any fsspec URL, whole and by ranges."""

from imm_scale.storage.files import (
    check_writable,
    create_bytes,
    exists,
    is_temporary,
    list_names,
    make_folder,
    read_bytes,
    read_into,
    read_range,
    read_text,
    remove,
    size,
    write_bytes,
    write_chunks,
    write_file,
    write_text,
)
from imm_scale.storage.retries import OnRetry, RetryPolicy
from imm_scale.storage.urls import is_local, join, local_path, name, parent, shown

__all__ = [
    "OnRetry",
    "RetryPolicy",
    "check_writable",
    "create_bytes",
    "exists",
    "is_local",
    "is_temporary",
    "join",
    "list_names",
    "local_path",
    "make_folder",
    "name",
    "parent",
    "read_bytes",
    "read_into",
    "read_range",
    "read_text",
    "remove",
    "shown",
    "size",
    "write_bytes",
    "write_chunks",
    "write_file",
    "write_text",
]
