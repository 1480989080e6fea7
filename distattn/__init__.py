"""Attention of a sequence whose KV lies on several instances: queries travel, partial states come back, KV stays."""
