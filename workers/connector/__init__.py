"""The KV connector that vLLM loads: pages from a prefill engine to a decode engine, under leases and a fence."""
