"""Parquet files of images and labels, as the Hugging Face hub has them."""

import json
from collections.abc import Iterator
from typing import Any

from data_tools.sources.base import Labelled, Slice
from data_tools.sources.spool import Spool
from imm_scale.errors import UserError


def labelled(files: list[str], image_column: str, label_column: str) -> Labelled:
    """Rows of image bytes (or {bytes, path}) and a label. They go through a temporary file, to be read in any order.

    Raises:
        UserError: no such columns, columns of another kind, or a damaged file.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"Parquet needs pyarrow ({error}): pip install 'imm-scale[sources]'") from error
    spool = Spool(files[0])
    found = Labelled(keeps=[spool])
    for i, path in enumerate(files):
        try:
            table = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
            class_names = _check_columns(path, table.schema_arrow, image_column, label_column)
            for row, (image, label) in enumerate(_rows(table, image_column, label_column)):
                _add(found, f"{path}:{row}", image, label, spool)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            what = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"{path} is no readable Parquet file ({what}): it is damaged or cut short") from error
        if i and class_names != found.class_names:
            raise UserError(f"{path} and {files[0]} name different classes: pack them apart, or give --labels")
        found.class_names = class_names
    spool.flush()
    return found


def _check_columns(path: str, schema: Any, image_column: str, label_column: str) -> list[str] | None:
    """The names of the classes, if the schema says them. Raises UserError."""
    import pyarrow.types as types

    missing = sorted({image_column, label_column} - set(schema.names))
    if missing:
        raise UserError(
            f"{path} has no column {missing[0]!r}, only {', '.join(schema.names)}: "
            "name them by --image-column and --label-column"
        )
    double = next((name for name in (image_column, label_column) if schema.names.count(name) > 1), None)
    if double is not None:
        raise UserError(f"{path} has several columns {double!r}: which is meant? Write it again with one of the name")
    kind = _value_type(schema.field(image_column).type)
    content = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    checks = types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view
    if not any(check(content) for check in checks) and not _is_list_of_bytes(content):
        raise UserError(f"{path}: column {image_column} is {kind}: bytes of image files are needed, see --image-column")
    kind = schema.field(label_column).type
    if not any(check(_value_type(kind)) for check in (types.is_integer, types.is_floating, types.is_boolean, _is_text)):
        raise UserError(
            f"{path}: column {label_column} is {kind}: a number or a name per row is needed, see --label-column"
        )
    return _class_names(schema.metadata or {}, label_column)


def _value_type(kind: Any) -> Any:
    """What a column holds, whether or not its equal values are stored once."""
    import pyarrow.types as types

    return kind.value_type if types.is_dictionary(kind) else kind


def _is_list_of_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    return (types.is_list(kind) or types.is_large_list(kind)) and types.is_uint8(kind.value_type)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _class_names(metadata: dict[bytes, bytes], label_column: str) -> list[str] | None:
    """Names of a ClassLabel of Hugging Face's datasets, which writes its features into the schema."""
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][label_column]
        return [str(name) for name in feature["names"]] if feature["names"] else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _rows(table: Any, image_column: str, label_column: str) -> Iterator[tuple[Any, Any]]:
    for batch in table.iter_batches(batch_size=256, columns=[image_column, label_column]):
        yield from zip(batch[image_column].to_pylist(), batch[label_column].to_pylist(), strict=True)


def _add(found: Labelled, name: str, image: Any, label: Any, spool: Spool) -> None:
    content = image.get("bytes") if isinstance(image, dict) else image
    if content is None:
        path = image.get("path") if isinstance(image, dict) else None
        found.bad.append((name, f"no bytes of an image{f', only its path {path}' if path else ''}"))
        return
    if label is None or label == "" or (isinstance(label, float) and not label.is_integer()):  # nor NaN or infinity
        found.bad.append((name, f"its label is {label!r}"))
        return
    data = bytes(content)
    found.add(name, label if isinstance(label, str) else int(label), Slice(spool.name, spool.write(data), len(data)))
