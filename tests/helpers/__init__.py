"""What tests share: tiny models and projects, oracles that share no code with the library."""
