"""What draws and scores tokens: transformers in this process, vLLM in this process, a vLLM server."""
