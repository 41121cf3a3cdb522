"""Where activations come from: text, language models, shards."""
