"""An experiment in forms that others open: a Hugging Face dataset, Parquet, safetensors, JSON, GGUF control vectors."""
