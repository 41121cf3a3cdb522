"""What the contextual SAE is compared with: SAEs of other papers, written here from the papers."""
