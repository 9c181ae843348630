"""Tokens that need the long context: LongPPL and LongCE."""
