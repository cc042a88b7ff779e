"""Loading models: checkpoints, the embedded model, engines, memory."""
