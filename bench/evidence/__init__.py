"""Whether the contextual SAE works, shown fairly: `csae evidence`."""
