"""GGUF files for a stock llama.cpp: what is written (`architectures`, `vocabulary`, `quantise`, `writer`), and the
runtime that they are checked in (`library`, in a process of its own: `worker`, asked through `ask`)."""
