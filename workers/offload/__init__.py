"""Tiers below the engine's memory, as vLLM's offloading connector loads them; see ``docs/tiers.md``."""
