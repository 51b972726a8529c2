"""Training and what it shares with the other programs; imported by commands only, never by `import nat_models`."""
