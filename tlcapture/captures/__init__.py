"""A capture as an object and as a file: content, format, index, provenance."""
