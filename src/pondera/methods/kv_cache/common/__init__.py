"""Shared parts of KV cache methods: eviction policies, budgets, codecs, windowed codec caches and token pruning."""
