//! Files: sources, tokenizers, packed shards, safetensors
