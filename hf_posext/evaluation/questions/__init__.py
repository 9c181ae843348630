"""What a model finds in a long text: pass keys and a small RULER-like set."""
