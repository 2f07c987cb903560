"""Engines behind one interface: vLLM, and a simulated one for tests of scale and scheduling."""
