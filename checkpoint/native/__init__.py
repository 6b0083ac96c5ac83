"""The project's own folder form: safetensors and JSON, matrices as stored."""
