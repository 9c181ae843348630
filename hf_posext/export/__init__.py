"""Export of patched models for servers: config, flags, and the differences of each server."""

from .llama_cpp import read_gguf, write_gguf
from .servers import SERVERS, Serving, export_checkpoint

__all__ = ["SERVERS", "Serving", "export_checkpoint", "read_gguf", "write_gguf"]
