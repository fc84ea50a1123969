"""The stages that every method has, in their order."""

STAGES = ("plan", "recover", "model", "evaluation", "export", "bench", "quantise", "release")
